"""Logistic regression with soft labels, weights and, if asked for, an L1 penalty; solved to full precision."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

_STEPS, _SWEEPS = 100, 1000
_SETTLED = 1e-10  # change of a coefficient
_ROUNDING = 1e-12  # of an objective that is a sum over rows


def fit_logistic(
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    penalty: float = 0.0,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Coefficients ``[F]`` that minimise ``penalty |w|_1 + sum_i weights_i (log(1 + exp(x_i w)) - y_i x_i w)``.

    Newton steps; with a penalty each solves its quadratic model by coordinate descent and goes along it as far as the
    objective falls. Source: Yuan, Ho and Lin, Journal of Machine Learning Research 13 (2012), whose stopping rule is
    looser. Where the rows can be separated and there is no penalty, the coefficients stop where the loss has vanished.

    Args:
        x: features ``[N, F]``; there is no intercept but a column of ones.
        y: labels ``[N]`` in [0, 1].
        weights: of the rows, ``[N]``; one each if None.
        penalty: strength of the L1 penalty.
        start: coefficients to start from.
    """
    weights = np.ones(len(y)) if weights is None else weights
    w = np.zeros(x.shape[1]) if start is None else start
    value = _objective(x, y, weights, penalty, w)
    for _ in range(_STEPS):
        p = expit(x @ w)
        gradient = x.T @ (weights * (p - y))
        curvature = (x.T * (weights * p * (1 - p))) @ x
        curvature[np.diag_indices_from(curvature)] += 1e-12 * (1 + np.trace(curvature))  # of features that are alike
        step = _minimise_quadratic(gradient, curvature, penalty, w) - w
        if np.abs(step).max() < _SETTLED:
            break
        expected = gradient @ step + penalty * (np.abs(w + step).sum() - np.abs(w).sum())
        allowed = value + _ROUNDING * abs(value)
        length = 1.0
        while (reached := _objective(x, y, weights, penalty, w + length * step)) > allowed + 1e-4 * length * expected:
            length /= 2
        w, value = w + length * step, reached
    return w


def log_loss(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of every row, ``[N]``: ``log(1 + exp(x_i w)) - y_i x_i w``."""
    z = x @ w
    return np.logaddexp(0, z) - y * z


def _objective(x: np.ndarray, y: np.ndarray, weights: np.ndarray, penalty: float, w: np.ndarray) -> float:
    return float(weights @ log_loss(x, y, w) + penalty * np.abs(w).sum())


def _minimise_quadratic(gradient: np.ndarray, curvature: np.ndarray, penalty: float, w: np.ndarray) -> np.ndarray:
    """Minimum over v of ``gradient (v - w) + (v - w) curvature (v - w) / 2 + penalty |v|_1``."""
    if not penalty:
        return w - np.linalg.solve(curvature, gradient)
    v = w.copy()
    for _ in range(_SWEEPS):
        before = v.copy()
        for j in range(len(v)):
            slope = gradient[j] + curvature[j] @ (v - w) - curvature[j, j] * v[j]
            v[j] = -np.sign(slope) * max(abs(slope) - penalty, 0) / curvature[j, j]
        if np.abs(v - before).max() < _SETTLED / 1000:
            break
    return v
