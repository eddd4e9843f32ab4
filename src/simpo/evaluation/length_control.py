"""The win rate that there would be if both answers were equally long."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, stdtrit

from simpo.evaluation.logistic import fit_logistic, is_determined
from simpo.statistics import Interval

_METHOD = "logistic, robust 95%"


def length_controlled_win_rate(verdicts: np.ndarray, longer_by: np.ndarray, prompts: np.ndarray) -> Interval | None:
    """Win rate at equal lengths, by the logistic regression of verdicts on ``[tanh(longer_by / s), 1]``.

    As AlpacaEval's, with ``s`` the standard deviation of the differences, but without its terms for the difficulty of
    its own instructions and without its penalty. The interval is made on the logit, from the sandwich covariance over
    prompts, and so is not symmetric. Sources: Dubois et al., arXiv 2404.04475, section 3; Liang and Zeger, Biometrika
    73 (1986), equation 7.

    Args:
        verdicts: ``[P]``, 1 where the first answer wins, 0 where the second does, or between.
        longer_by: ``[P]``, length of the first answer less that of the second.
        prompts: ``[P]``, which prompt each pair belongs to; a prompt counts once, however many pairs it has.

    Returns:
        The win rate, n the number of prompts; None where lengths explain so much that nothing can be said of equal
        ones, as where whatever is longer has won. No more prompts than coefficients have no interval.
    """
    _, prompt, pairs = np.unique(prompts, return_inverse=True, return_counts=True)
    weights = 1 / pairs[prompt]
    if (verdicts == verdicts[0]).all():
        return Interval(float(verdicts[0]), None, None, len(pairs), _METHOD)
    constant = np.ones(len(verdicts))
    spread = longer_by.std(ddof=1)
    features = np.column_stack([np.tanh(longer_by / spread), constant]) if spread else constant[:, None]
    fitted = fit_logistic(features, verdicts, weights)
    if not is_determined(features, fitted, weights):
        return None
    if len(pairs) <= features.shape[1]:
        return Interval(float(expit(fitted[-1])), None, None, len(pairs), _METHOD)
    half = stdtrit(len(pairs) - 1, 0.975) * _robust_error(features, verdicts, weights, prompt, fitted)
    logit = fitted[-1]
    return Interval(float(expit(logit)), float(expit(logit - half)), float(expit(logit + half)), len(pairs), _METHOD)


def _robust_error(x: np.ndarray, y: np.ndarray, weights: np.ndarray, prompt: np.ndarray, fitted: np.ndarray) -> float:
    """Standard error of the last coefficient where pairs of one prompt are alike."""
    p = expit(x @ fitted)
    scores = np.zeros((prompt.max() + 1, x.shape[1]))
    np.add.at(scores, prompt, x * (weights * (y - p))[:, None])
    bread = np.linalg.inv((x.T * (weights * p * (1 - p))) @ x)
    n = len(scores)
    covariance = n / (n - 1) * bread @ (scores.T @ scores) @ bread
    return float(np.sqrt(covariance[-1, -1]))
