"""Metrics of verdicts on pairs of answers: win rates, length control as in AlpacaEval, and agreement of judges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import expit, stdtrit

from simpo.judging.protocol import Pair
from simpo.runs.results import Metric
from simpo.statistics import Interval, bootstrap_interval, cohen_kappa

# ---- Logistic regression with soft labels, weights and an optional L1 penalty, solved to full precision.

_STEPS, _SWEEPS = 100, 1000
_CONVERGED = 1e-10  # change in a coefficient
_ROUNDING = 1e-12  # relative rounding error of an objective summed over rows
_COLLINEAR = 1e-8  # ratio of the smallest to the largest eigenvalue
_VANISHED = 1e-6  # label variance


def fit_logistic(
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    penalty: float = 0.0,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Find coefficients ``[F]`` that minimize ``penalty |w|_1 + sum_i weights_i (log(1 + exp(x_i w)) - y_i x_i w)``.

    Takes Newton steps with a line search; with a penalty, each step minimizes its quadratic model by coordinate
    descent. Source: Yuan, Ho and Lin, Journal of Machine Learning Research 13 (2012), with a stricter stopping rule. If
    the rows are separable and there is no penalty, the iteration stops once the loss has vanished.

    Args:
        x: features ``[N, F]``; include a column of ones for an intercept.
        y: labels ``[N]``, in [0, 1].
        weights: row weights ``[N]``; all 1 if None.
        penalty: strength of the L1 penalty.
        start: initial coefficients ``[F]``; zeros if None.
    """

    def objective(w: np.ndarray) -> float:
        return float(weights @ log_loss(x, y, w) + penalty * np.abs(w).sum())

    weights = np.ones(len(y)) if weights is None else weights
    w = np.zeros(x.shape[1]) if start is None else start
    value = objective(w)
    for _ in range(_STEPS):
        p = expit(x @ w)
        gradient = x.T @ (weights * (p - y))
        curvature = (x.T * (weights * p * (1 - p))) @ x
        curvature[np.diag_indices_from(curvature)] += 1e-12 * (1 + np.trace(curvature))  # for collinear features
        step = _minimize_quadratic(gradient, curvature, penalty, w) - w
        if np.abs(step).max() < _CONVERGED:
            break
        expected = gradient @ step + penalty * (np.abs(w + step).sum() - np.abs(w).sum())
        allowed = value + _ROUNDING * abs(value)
        length = 1.0
        while (reached := objective(w + length * step)) > allowed + 1e-4 * length * expected:
            length /= 2
        w, value = w + length * step, reached
    return w


def is_determined(x: np.ndarray, w: np.ndarray, weights: np.ndarray | None = None) -> bool:
    """Whether the data determine the coefficients ``w`` of an unpenalized :func:`fit_logistic`.

    They do not if features are collinear, or if labels are (quasi-)separable: then some coefficient diverges, and its
    final value is meaningless. Separation shows as a direction in which the mean of ``p (1 - p)``, weighted by the
    squared feature, has vanished. Source: Albert and Anderson, Biometrika 71 (1984). Features that are zero in all
    rows are ignored.
    """
    weights = np.ones(len(x)) if weights is None else weights
    p = expit(x @ w)
    x = x[:, x.any(axis=0)]
    sizes, directions = np.linalg.eigh((x.T * weights) @ x)
    if sizes[0] < _COLLINEAR * sizes[-1]:
        return False
    units = directions / np.sqrt(sizes)
    variances = np.linalg.eigvalsh(units.T @ ((x.T * (weights * p * (1 - p))) @ x) @ units)
    return bool(variances[0] > _VANISHED)


def log_loss(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Compute the logistic loss of every row, ``[N]``: ``log(1 + exp(x_i w)) - y_i x_i w``."""
    z = x @ w
    return np.logaddexp(0, z) - y * z


def _minimize_quadratic(gradient: np.ndarray, curvature: np.ndarray, penalty: float, w: np.ndarray) -> np.ndarray:
    """Find the v that minimizes ``gradient (v - w) + (v - w) curvature (v - w) / 2 + penalty |v|_1``."""
    if not penalty:
        return w - np.linalg.solve(curvature, gradient)
    v = w.copy()
    for _ in range(_SWEEPS):
        before = v.copy()
        for j in range(len(v)):
            slope = gradient[j] + curvature[j] @ (v - w) - curvature[j, j] * v[j]
            v[j] = -np.sign(slope) * max(abs(slope) - penalty, 0) / curvature[j, j]
        if np.abs(v - before).max() < _CONVERGED / 1000:
            break
    return v


# ---- AlpacaEval's win rate.


def win_rates(preferences: np.ndarray) -> dict[str, float]:
    """Compute raw and discrete win rates in percent, and counts, under the leaderboard's names.

    ``preferences`` ``[N]`` are in [1, 2], with 2 if the model is preferred; a draw is exactly 1.5 and counts half. The
    standard error of a single preference is NaN.
    """
    shares = preferences - 1
    wins, losses = int((shares > 0.5).sum()), int((shares < 0.5).sum())
    draws = len(shares) - wins - losses
    return {
        "win_rate": 100 * float(shares.mean()),
        "standard_error": 100 * standard_error(shares),
        "discrete_win_rate": 100 * (wins + draws / 2) / len(shares),
        "n_wins": wins,
        "n_draws": draws,
        "n_wins_base": losses,
    }


def standard_error(values: np.ndarray) -> float:
    """Compute the standard error of the mean of ``values`` ``[N]``; NaN for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


# ---- AlpacaEval's length-controlled win rate: the win rate if both sides' answers had the same length.

_FOLDS = 5
_GAMED_WEIGHT = 0.1  # weight of each row of the two gamed baselines
STRENGTHS = np.logspace(-4, 4, 10)  # candidate inverse penalty strengths for cross-validation


class Baselines(NamedTuple):
    """Data that the benchmark measured once and uses in every model's fit."""

    difficulties: np.ndarray  # [N], one per instruction, in the benchmark's order
    x: np.ndarray  # [G, 3], features of the gamed baselines' rows; the third is 0
    y: np.ndarray  # [G], preferences of these rows, in [0, 1]


class LengthControlled(NamedTuple):
    """A length-controlled win rate in percent, with the fit behind it."""

    win_rate: float  # mean over instructions of the predicted preference at equal lengths
    standard_error: float  # of that mean, ignoring uncertainty in the fit
    coefficients: np.ndarray  # [3]: length, difficulty, model


def length_controlled(
    preferences: np.ndarray,
    baseline_lengths: np.ndarray,
    lengths: np.ndarray,
    baselines: Baselines,
    *,
    strength: float | None = None,
) -> LengthControlled:
    """Fit the benchmark's logistic model to a model's preferences and predict them at equal lengths.

    Difficulties are looked up by position, as in the benchmark. The baseline's own win rate is 50 by definition.

    Args:
        preferences: ``[N]``, in [1, 2] or NaN; rows that are NaN are predicted but not fitted.
        baseline_lengths: lengths of the baseline's answers in characters, ``[N]``.
        lengths: lengths of the model's answers in characters, ``[N]``.
        baselines: difficulties, at least N of them, and gamed rows.
        strength: inverse penalty strength; chosen by cross-validation if None.
    """
    difficulties = baselines.difficulties[: len(preferences)]
    if np.array_equal(baseline_lengths, lengths) and (preferences == 1.5).all():
        return LengthControlled(50.0, 0.0, np.zeros(3))
    difference = (baseline_lengths - lengths).astype(np.float64)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    relative = np.tanh(difference / spread) if spread else np.zeros(len(difference))
    judged = ~np.isnan(preferences)
    features = np.column_stack([relative, difficulties, np.ones(len(relative))])[judged]
    x = np.concatenate([baselines.x, features])
    y = np.concatenate([baselines.y, preferences[judged] - 1])
    weights = np.concatenate([np.full(len(baselines.y), _GAMED_WEIGHT), np.ones(len(features))])
    strength = cross_validated_strength(x, y, weights) if strength is None else strength
    coefficients = fit_logistic(x, y, weights * strength, penalty=1.0)
    predicted = predicted_preferences(difficulties, coefficients)
    return LengthControlled(100 * float(predicted.mean()), 100 * standard_error(predicted), coefficients)


def predicted_preferences(difficulties: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Predict preferences ``[N]``, in [0, 1], at equal lengths, from the coefficients of :class:`LengthControlled`."""
    return expit(coefficients[1] * difficulties + coefficients[2])


def cross_validated_strength(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Return the value in :data:`STRENGTHS` with the lowest weighted log loss on held-out rows."""
    losses = np.zeros(len(STRENGTHS))
    for held_out in folds(len(y)):
        fitted, coefficients = ~held_out, None
        for index, strength in enumerate(STRENGTHS):
            coefficients = fit_logistic(
                x[fitted], y[fitted], weights[fitted] * strength, penalty=1.0, start=coefficients
            )
            losses[index] += (weights[held_out] * log_loss(x[held_out], y[held_out], coefficients)).mean()
    return float(STRENGTHS[losses.argmin()])


def folds(n: int) -> Iterator[np.ndarray]:
    """Yield a mask ``[n]`` of held-out rows for every fold.

    Folds match those of scikit-learn's GroupKFold, which deals out groups of equal size from the last to the first.
    """
    order = np.arange(n)[::-1]
    for fold in range(_FOLDS):
        yield order % _FOLDS == fold


# ---- A length-controlled win rate for any pairs of answers.

_METHOD = "logistic, robust 95%"


def length_controlled_win_rate(verdicts: np.ndarray, longer_by: np.ndarray, prompts: np.ndarray) -> Interval | None:
    """Estimate the win rate at equal lengths by logistic regression of verdicts on ``[tanh(longer_by / s), 1]``.

    This is AlpacaEval's model, where ``s`` is the standard deviation of the differences, without its terms for
    instruction difficulty and without its penalty. The interval is computed on the logit scale from the sandwich
    covariance clustered by prompt, so it is not symmetric. Sources: Dubois et al., arXiv 2404.04475, section 3; Liang
    and Zeger, Biometrika 73 (1986), equation 7.

    Args:
        verdicts: ``[P]``, 1 if the first answer wins, 0 if the second does, or anything in between.
        longer_by: ``[P]``, length of the first answer minus length of the second.
        prompts: ``[P]``, index of each pair's prompt; every prompt has the same weight, however many pairs it has.

    Returns:
        The win rate, where n is the number of prompts, or None if length alone determines the verdicts, for example if
        the longer answer always wins. There is no interval unless there are more prompts than coefficients.
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
    p = expit(features @ fitted)
    scores = np.zeros((len(pairs), features.shape[1]))
    np.add.at(scores, prompt, features * (weights * (verdicts - p))[:, None])
    bread = np.linalg.inv((features.T * (weights * p * (1 - p))) @ features)
    covariance = len(pairs) / (len(pairs) - 1) * bread @ (scores.T @ scores) @ bread
    half = stdtrit(len(pairs) - 1, 0.975) * float(np.sqrt(covariance[-1, -1]))
    logit = fitted[-1]
    return Interval(float(expit(logit)), float(expit(logit - half)), float(expit(logit + half)), len(pairs), _METHOD)


# ---- Metrics of verdicts.


@dataclass(frozen=True)
class Judged:
    """Pairs of answers with every judge's verdicts on them."""

    pairs: Sequence[Pair]  # the answers `a` and `b`
    prompts: np.ndarray  # index of each pair's prompt, `[P]`
    # Judge -> `[P]`: 1 if `a` wins, 0 if `b` does, or anything in between; NaN without a verdict.
    verdicts: dict[str, np.ndarray] = field(default_factory=dict)
    # Judge -> `[P]`: the score of `a` minus the score of `b`, for judges that score.
    margins: dict[str, np.ndarray] = field(default_factory=dict)


def preference_metrics(judged: Judged, seed: int) -> list[Metric]:
    """Compute the metrics of every judge and the agreement of every two judges; ``seed`` is for the bootstrap."""
    longer = np.array([len(pair.a) - len(pair.b) for pair in judged.pairs], dtype=np.float64)
    metrics = []
    for judge, verdicts in judged.verdicts.items():
        known = ~np.isnan(verdicts)
        controlled = ties = None
        if known.any():
            controlled = length_controlled_win_rate(verdicts[known], longer[known], judged.prompts[known])
            ties = float(np.mean(verdicts[known] == 0.5))
        metrics += [
            Metric.of(f"win_rate/{judge}", win_rate_over_prompts(verdicts, judged.prompts, seed)),
            Metric.of(f"length_controlled_win_rate/{judge}", controlled),
            Metric(f"ties/{judge}", ties, n=int(known.sum())),
            Metric(f"without_verdict/{judge}", int((~known).sum()), n=len(verdicts)),
        ]
    for (one, first), (other, second) in combinations(judged.verdicts.items(), 2):
        metrics += agreement_metrics(f"{one}+{other}", judged.prompts, first, second, seed)
    return metrics


def win_rate_over_prompts(verdicts: np.ndarray, prompts: np.ndarray, seed: int) -> Interval | None:
    """Average the fraction of pairs that ``a`` wins over prompts, with a bootstrap interval over prompts.

    Ties count half, and ``verdicts`` ``[P]`` that are NaN are ignored; ``prompts`` ``[P]`` is the index of each pair's
    prompt. The result's n is the number of prompts with a verdict; None if there are none.
    """
    known = ~np.isnan(verdicts)
    if not known.any():
        return None
    _, prompt, pairs = np.unique(prompts[known], return_inverse=True, return_counts=True)
    shares = np.bincount(prompt, weights=verdicts[known]) / pairs
    sums = np.column_stack([shares, np.ones(len(shares))])
    return bootstrap_interval(sums, lambda sums: sums[..., 0] / sums[..., 1], seed=seed)


def agreement_metrics(name: str, prompts: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int) -> list[Metric]:
    """Compute how often two judges agree on the winner (``a``, tie or ``b``), and Cohen's kappa, over prompts."""
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        return [Metric(f"agreement/{name}", None, n=0), Metric(f"kappa/{name}", None, n=0)]
    # 0 if b wins, 1 for a tie, 2 if a wins.
    winners = ((np.sign(verdicts[both] - 0.5) + 1).astype(np.int64) for verdicts in (first, second))
    cells = 3 * next(winners) + next(winners)
    _, prompt = np.unique(prompts[both], return_inverse=True)
    tables = np.zeros((prompt.max() + 1, 9))  # a 3x3 table for every prompt
    np.add.at(tables, (prompt, cells), 1.0)

    def agreement(tables: np.ndarray) -> np.ndarray:
        return tables[..., ::4].sum(-1) / tables.sum(-1)  # the diagonal

    def kappa(tables: np.ndarray) -> np.ndarray:
        return cohen_kappa(tables.reshape(*tables.shape[:-1], 3, 3))

    return [
        Metric.of(f"agreement/{name}", bootstrap_interval(tables, agreement, seed=seed)),
        Metric.of(f"kappa/{name}", bootstrap_interval(tables, kappa, seed=seed)),
    ]
