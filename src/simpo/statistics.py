"""Computes confidence intervals, tests and agreement measures for quantities measured on n items.

Uses ``scipy.special`` instead of ``scipy.stats``, which takes ten times as long to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

_UPPER_TAIL = 0.975  # two-sided 95%
_RESAMPLES = 2000
_MAX_DRAWS = 1 << 22  # how many draws are held in memory at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided 95% confidence interval."""

    value: float  # the estimate
    low: float | None  # lower bound; None if there is none
    high: float | None  # upper bound; None if there is none
    n: int  # number of observations
    method: str  # how the bounds were computed


def proportion_interval(successes: int, n: int) -> Interval:
    """Compute the Wilson score interval of a proportion.

    It keeps its coverage for small ``n`` and near 0 and 1, where the textbook interval (Wald) collapses. Source:
    Wilson, Journal of the American Statistical Association 22 (1927); Brown, Cai and DasGupta, Statistical Science 16
    (2001).

    Raises:
        ValueError: ``n`` is not positive, or ``successes`` is not in 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials is not a proportion")
    z = float(special.ndtri(_UPPER_TAIL))
    share = successes / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # With 0 or n successes, one bound equals the estimate; rounding must not move it past the estimate.
    low, high = min(share, center - half), max(share, center + half)
    return Interval(share, max(0.0, float(low)), min(1.0, float(high)), n, "Wilson 95%")


def mean_interval(
    values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None
) -> Interval:
    """Compute the Student t interval of the mean of independent ``values`` ``[n]``, in their unit.

    With ``weights`` ``[n]``, the interval is for ``sum(weights * values) / sum(weights)``. An example is a mean over
    tokens: the independent items are texts of different lengths, because tokens within a text are correlated. The error
    is that of a ratio of two means, to first order. Source: Cochran, Sampling Techniques (1977), equation 6.13.

    The bounds are None for a single value, and for values that are all equal, because their spread is unknown.

    Raises:
        ValueError: no values, more than one dimension, or not one weight for each value.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones(x.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.ndim != 1 or not x.size or x.shape != w.shape:
        raise ValueError(f"needs at least one value and one weight for each value, got shapes {x.shape} and {w.shape}")
    n, mean = x.size, float((w * x).sum() / w.sum())
    method = "Student t 95%" if weights is None else "ratio, Student t 95%"
    if n == 1 or (x == x[0]).all():
        return Interval(mean, None, None, n, method)
    error = np.sqrt(n / (n - 1) * (w**2 * (x - mean) ** 2).sum()) / w.sum()
    half = float(special.stdtrit(n - 1, _UPPER_TAIL) * error)
    return Interval(mean, mean - half, mean + half, n, method)


def share_interval(
    values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None
) -> Interval:
    """Compute the interval of the mean of ``[n]`` fractions from 0 to 1, one per independent item, within [0, 1].

    Works like :func:`mean_interval`, with bounds from :func:`share_bounds`.
    """
    interval = mean_interval(values, weights)
    if interval.low is None:
        return interval
    low, high = share_bounds(interval.value, interval.value - interval.low)
    return replace(interval, low=low, high=high, method=f"Wilson, {interval.method}")


def rate_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Compute the interval of the mean of outcomes ``[n]``: a proportion if all are 0 or 1, otherwise fractions."""
    data = np.asarray(values, dtype=np.float64)
    return proportion_interval(int(data.sum()), len(data)) if np.isin(data, (0, 1)).all() else share_interval(data)


def share_bounds(share: float, half: float) -> tuple[float, float]:
    """Convert a symmetric interval of width ``2 * half`` around a fraction to Wilson bounds, which stay in [0, 1].

    They are the bounds of a proportion with the effective number of trials that gives the same standard error. Source:
    Franco, Little, Louis and Slud, Journal of Survey Statistics and Methodology 7 (2019).
    """
    if not 0 < share < 1:
        return max(0.0, share - half), min(1.0, share + half)
    k = half**2 / (share * (1 - share))  # Wilson's z**2 / n
    center, spread = (share + k / 2) / (1 + k), np.sqrt(half**2 + k**2 / 4) / (1 + k)
    return max(0.0, float(center - spread)), min(1.0, float(center + spread))


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> Interval:
    """Compute Spearman's rank correlation, with an interval from Fisher's transformation; NaN if one side is constant.

    Source of the variance: Bonett and Wright, Psychometrika 65 (2000).
    """
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (x, y)]
    n = len(ranks[0])
    if n < 4 or any(np.ptp(side) == 0 for side in ranks):
        return Interval(math.nan, None, None, n, "")
    rho = float(np.corrcoef(np.stack(ranks))[0, 1])
    if abs(rho) > 1 - 1e-12:
        return Interval(rho, None, None, n, "")
    half = float(special.ndtri(_UPPER_TAIL)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(rho) + sign * half) for sign in (-1, 1))
    return Interval(rho, low, high, n, "Fisher's z 95%")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks starting at 1; ties get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def bootstrap_interval(
    sums: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    resamples: int = _RESAMPLES,
    family: int = 1,
) -> Interval:
    """Compute the percentile bootstrap interval of a statistic that is a function of sums over independent items.

    Whole items are resampled with replacement, so that correlated observations within an item do not count as
    independent. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    Args:
        sums: ``[n, m]``, the contribution of each item to the ``m`` sums.
        statistic: maps ``[..., m]`` sums to ``[...]`` values; NaN where it is undefined.
        seed: determines the draws.
        resamples: number of resamples for each interval in the family.
        family: number of intervals that should all hold simultaneously with 95% confidence (Bonferroni).

    Returns:
        The statistic of all items, without bounds if all items are equal or the statistic of a resample is undefined.

    Raises:
        ValueError: no items, or ``sums`` is not two-dimensional.
    """
    if sums.ndim != 2 or not len(sums):
        raise ValueError(f"the bootstrap needs sums [n, m] of at least one item, got shape {sums.shape}")
    n, value = len(sums), float(statistic(sums.sum(0)))
    method = "bootstrap 95%" if family == 1 else f"bootstrap, 95% for all {family} together"
    if (sums == sums[0]).all():
        return Interval(value, None, None, n, method)
    rng, total = np.random.default_rng(seed), resamples * family
    values = np.concatenate(
        [
            statistic(_draw_counts(rng, n, count) @ sums)
            for count in np.diff([*range(0, total, max(1, _MAX_DRAWS // n)), total])
        ]
    )
    tail = (1 - _UPPER_TAIL) / family
    low, high = np.quantile(values, (tail, 1 - tail))
    if np.isnan(low):
        return Interval(value, None, None, n, method)
    return Interval(value, float(low), float(high), n, method)


def _draw_counts(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """Draw how often each of ``n`` items occurs in each resample, ``[resamples, n]``."""
    drawn = rng.integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """Compute the agreement of two raters beyond chance, from -1 to 1; NaN if chance alone gives full agreement.

    ``(p_o - p_e) / (1 - p_e)``, where ``p_o`` is the observed rate of agreement and ``p_e`` the rate expected if both
    rated independently of the items with their own frequencies. Source: Cohen, Educational and Psychological
    Measurement 20 (1960), equation 1.

    Args:
        table: counts ``[..., c, c]`` of the first rater's category (row) and the second's (column).
    """
    shares = table / table.sum((-2, -1), keepdims=True)
    agreed = np.trace(shares, axis1=-2, axis2=-1)
    expected = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    # It is 1 only if both always choose the same category; rounding must not make the ratio look defined.
    defined = 1 - expected > 1e-12
    return np.where(defined, (agreed - expected) / np.where(defined, 1 - expected, 1.0), np.nan)


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Return the p-value of an exact one-sided test that ``after`` is better than ``before`` on the same items.

    Only items that were ``gained`` (from wrong to right) or ``lost`` carry information. If neither were better, gains
    and losses would be equally likely, so p is the probability of at least ``gained`` heads in ``gained + lost`` fair
    coin tosses, and 1 if nothing changed. Source: McNemar, Psychometrika 12 (1947), in its exact (binomial) form.

    Args:
        before: boolean ``[n]``, whether each item was right.
        after: boolean ``[n]``, the same items in the same order.

    Raises:
        ValueError: the inputs are not two boolean vectors of equal length.
    """
    first, second = np.asarray(before), np.asarray(after)
    if first.shape != second.shape or first.ndim != 1 or first.dtype != bool or second.dtype != bool:
        raise ValueError(
            f"before and after must be boolean [n] for the same items, "
            f"got {first.dtype} {first.shape} and {second.dtype} {second.shape}"
        )
    gained = int((second & ~first).sum())
    lost = int((first & ~second).sum())
    return float(special.bdtrc(gained - 1, gained + lost, 0.5))


def krippendorff_terms(counts: np.ndarray) -> np.ndarray:
    """Compute the terms of each unit, ``[n, c + 1]``, whose sums are the input of :func:`krippendorff_alpha`.

    They are the unit's category counts and its observed disagreement, or zeros for a unit with fewer than two ratings,
    which allows no comparison.

    Args:
        counts: ``[n, c]``, how many raters chose each of ``c`` unordered categories for each unit.
    """
    counts = np.asarray(counts, dtype=np.float64)
    raters = counts.sum(1)
    disagreed = (raters**2 - (counts**2).sum(1)) / np.maximum(raters - 1, 1)
    return np.where(raters[:, None] >= 2, np.column_stack([counts, disagreed]), 0.0)


def krippendorff_alpha(sums: np.ndarray) -> np.ndarray:
    """Compute the agreement of any number of raters beyond chance, at most 1; ratings may be missing.

    ``1 - D_o / D_e``, where the ratio is observed to expected disagreement between two ratings of a unit, for unordered
    categories; NaN if all ratings are the same. Source: Krippendorff, Content Analysis (2004), section 11.3.

    Args:
        sums: ``[..., c + 1]``, the sum of :func:`krippendorff_terms` over units.
    """
    categories = sums[..., :-1]
    n = categories.sum(-1)
    expected = (n**2 - (categories**2).sum(-1)) / np.maximum(n - 1, 1)
    defined = expected > 0
    return np.where(defined, 1 - sums[..., -1] / np.where(defined, expected, 1.0), np.nan)
