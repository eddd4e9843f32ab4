"""The expected score of the best of N answers, estimated over all subsets of the sampled answers."""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln


def best_of_n(selection_scores: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Return the mean score of the selected answer over all subsets of ``n`` answers, an unbiased estimate.

    The answer with rank ``i`` of ``K`` (1 is the worst) is the best of ``C(i - 1, n - 1)`` of the ``C(K, n)`` subsets.
    Source: Nakano et al. 2021 (WebGPT, arXiv 2112.09332), appendix I.

    Args:
        selection_scores: scores ``[P, K]`` of each prompt's answers; the highest is selected, ties arbitrarily.
        scores: scores ``[P, K]`` that the selected answers are evaluated by; may be the same.
        n: answers in a subset, from 1 to ``K``.

    Returns:
        ``[P]`` one mean per prompt.
    """
    count = selection_scores.shape[1]
    order = np.argsort(selection_scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    below = np.arange(n - 1, count)  # number of answers worse than the selected one
    log_weights = _log_choose(below, n - 1) - _log_choose(np.array(count), n)
    return ranked[:, n - 1 :] @ np.exp(log_weights)


def best_of_n_kl(n: int) -> float:
    """Return the upper bound on KL(best of n || base) in nats: ``log n - (n - 1) / n`` (Stiennon et al. 2020)."""
    return float(np.log(n) - (n - 1) / n)


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
