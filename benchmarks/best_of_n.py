"""The expected score of the best of N answers, over all subsets of the sampled answers."""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln


def best_of_n(chosen_by: np.ndarray, measured_by: np.ndarray, n: int) -> np.ndarray:
    """Mean over all subsets of ``n`` answers of what is measured of the one that is chosen, an unbiased estimate.

    The answer of rank ``i`` of ``K`` (the worst has 1) is the best of ``C(i - 1, n - 1)`` of the ``C(K, n)`` subsets.
    Source: Nakano et al. 2021 (WebGPT, arXiv 2112.09332), appendix I.

    Args:
        chosen_by: scores ``[P, K]`` of every prompt's answers; the highest is chosen, of equal ones any.
        measured_by: other scores of the same answers, or the same.
        n: answers in a subset, from 1 to ``K``.

    Returns:
        ``[P]`` a mean for every prompt.
    """
    count = chosen_by.shape[1]
    order = np.argsort(chosen_by, axis=1, kind="stable")
    ranked = np.take_along_axis(measured_by, order, axis=1)
    below = np.arange(n - 1, count)  # answers that are worse than the chosen one
    log_weights = _log_choose(below, n - 1) - _log_choose(np.array(count), n)
    return ranked[:, n - 1 :] @ np.exp(log_weights)


def best_of_n_kl(n: int) -> float:
    """The most that KL(best of n || all) can be, in nats: ``log n - (n - 1) / n`` (Stiennon et al. 2020)."""
    return float(np.log(n) - (n - 1) / n)


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
