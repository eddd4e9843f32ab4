"""Verdicts on pairs of answers to metrics: win rates, length control, ties, agreement of judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from scipy.special import expit, stdtrit

from simpo.judging.protocol import Pair
from simpo.runs.results import Metric
from simpo.statistics import Interval, bootstrap_interval, cohen_kappa

# ---- Logistic regression with soft labels, weights and, if asked for, an L1 penalty; solved to full
# precision.


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
    """The logistic loss of every row, ``[N]``: ``log(1 + exp(x_i w)) - y_i x_i w``."""
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


# ---- The win rate that there would be if both answers were equally long.


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


@dataclass(frozen=True)
class Judged:
    """Pairs of answers and every judge's verdicts on them.

    Attributes:
        pairs: ``a`` the one model's answer, ``b`` the other's.
        prompts: for every pair the number of its prompt, ``[P]``.
        verdicts: judge -> ``[P]``, 1 where ``a`` wins, 0 where ``b`` does, or between; NaN where there is no verdict.
        margins: judge -> ``[P]``, by how much the score of ``a`` is above that of ``b``, of judges that score.
    """

    pairs: Sequence[Pair]
    prompts: np.ndarray
    verdicts: dict[str, np.ndarray] = field(default_factory=dict)
    margins: dict[str, np.ndarray] = field(default_factory=dict)


def preference_metrics(judged: Judged, seed: int) -> list[Metric]:
    """The figures of every judge, and of every two of them.

    Args:
        judged: pairs and verdicts.
        seed: of the bootstrap.
    """
    metrics = []
    for judge, verdicts in judged.verdicts.items():
        metrics += _judge_metrics(judge, judged, verdicts, seed)
    for (one, first), (other, second) in combinations(judged.verdicts.items(), 2):
        metrics += _agreement_metrics(f"{one}+{other}", judged.prompts, first, second, seed)
    return metrics


def win_rate_over_prompts(verdicts: np.ndarray, prompts: np.ndarray, seed: int) -> Interval | None:
    """Mean over prompts of the share that ``a`` wins, ties half, with a bootstrap interval over prompts.

    Args:
        verdicts: ``[P]``; NaN, where there is none, does not count.
        prompts: ``[P]``, which prompt each pair belongs to.
        seed: of the bootstrap.

    Returns:
        The win rate, n the number of prompts with a verdict; None without any.
    """
    known = ~np.isnan(verdicts)
    if not known.any():
        return None
    _, prompt, pairs = np.unique(prompts[known], return_inverse=True, return_counts=True)
    shares = np.bincount(prompt, weights=verdicts[known]) / pairs
    return bootstrap_interval(np.column_stack([shares, np.ones(len(shares))]), _ratio, seed=seed)


def _judge_metrics(judge: str, judged: Judged, verdicts: np.ndarray, seed: int) -> list[Metric]:
    known = ~np.isnan(verdicts)
    longer = np.array([len(pair.a) - len(pair.b) for pair in judged.pairs], dtype=np.float64)
    controlled = None
    if known.any():
        controlled = length_controlled_win_rate(verdicts[known], longer[known], judged.prompts[known])
    return [
        _metric(f"win_rate/{judge}", win_rate_over_prompts(verdicts, judged.prompts, seed)),
        _metric(f"length_controlled_win_rate/{judge}", controlled),
        Metric(f"ties/{judge}", float(np.mean(verdicts[known] == 0.5)) if known.any() else None, n=int(known.sum())),
        Metric(f"without_verdict/{judge}", int((~known).sum()), n=len(verdicts)),
    ]


def _agreement_metrics(
    name: str, prompts: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int
) -> list[Metric]:
    """How often two judges say the same (``a``, tie or ``b``), and how far beyond chance, over prompts."""
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        return [Metric(f"agreement/{name}", None, n=0), Metric(f"kappa/{name}", None, n=0)]
    said = 3 * _winner(first[both]) + _winner(second[both])
    _, prompt = np.unique(prompts[both], return_inverse=True)
    tables = np.zeros((prompt.max() + 1, 9))
    np.add.at(tables, (prompt, said), 1.0)
    return [
        Metric.of(f"agreement/{name}", bootstrap_interval(tables, _agreement, seed=seed)),
        Metric.of(f"kappa/{name}", bootstrap_interval(tables, _kappa, seed=seed)),
    ]


def _winner(verdicts: np.ndarray) -> np.ndarray:
    """0 for ``b``, 1 for a tie, 2 for ``a``."""
    return (np.sign(verdicts - 0.5) + 1).astype(np.int64)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _agreement(tables: np.ndarray) -> np.ndarray:
    return tables[..., ::4].sum(-1) / tables.sum(-1)  # the diagonal of three by three


def _kappa(tables: np.ndarray) -> np.ndarray:
    return cohen_kappa(tables.reshape(*tables.shape[:-1], 3, 3))


def _metric(name: str, found: Interval | None) -> Metric:
    if found is None:
        return Metric(name, None)
    return Metric.of(name, found)
