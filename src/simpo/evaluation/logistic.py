"""Logistic regression with soft labels, weights and, if asked for, an L1 penalty; solved to full precision."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

_STEPS, _SWEEPS = 100, 1000
_SETTLED = 1e-10  # change of a coefficient
_ROUNDING = 1e-12  # of an objective that is a sum over rows
_ALIKE = 1e-8  # squared difference of features, relative to their squares
_VANISHED = 1e-6  # variance of labels


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


def is_determined(x: np.ndarray, w: np.ndarray, weights: np.ndarray | None = None) -> bool:
    """Whether the rows determine the coefficients of an unpenalised fit.

    They do not where features make up one another, nor where some rows can be separated by their labels: then a
    coefficient grows without end, and where it stopped says nothing. It shows in a direction in which the mean of
    ``p (1 - p)``, weighted by the squared feature, has vanished. Source: Albert and Anderson, Biometrika 71 (1984).

    Args:
        x: features ``[N, F]``; one that is zero in all rows does not count.
        w: of :func:`fit_logistic`.
        weights: of the rows, as there.
    """
    weights = np.ones(len(x)) if weights is None else weights
    p = expit(x @ w)
    x = x[:, x.any(axis=0)]
    sizes, directions = np.linalg.eigh((x.T * weights) @ x)
    if sizes[0] < _ALIKE * sizes[-1]:
        return False
    units = directions / np.sqrt(sizes)
    variances = np.linalg.eigvalsh(units.T @ ((x.T * (weights * p * (1 - p))) @ x) @ units)
    return bool(variances[0] > _VANISHED)


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
