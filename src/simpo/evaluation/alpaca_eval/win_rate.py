"""Win rates from a judge's preferences, raw and length-controlled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from simpo.evaluation.preferences import fit_logistic, log_loss


@dataclass(frozen=True)
class WinRate:
    """Figures of a model against the baseline, in percent and numbers of instructions.

    Attributes:
        win_rate: mean of the preferences, 100 times.
        standard_error: of that mean; NaN of a single preference.
        discrete_win_rate: share of wins, draws half.
        wins: instructions on which the model is preferred.
        losses: instructions on which the baseline is.
        draws: preferences of exactly 1.5.
        n: instructions with a preference.
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    wins: int
    losses: int
    draws: int
    n: int


def win_rate(preferences: np.ndarray) -> WinRate:
    """Raw and discrete win rate.

    Args:
        preferences: ``[N]`` in [1, 2], 2 where the model is preferred; NaN where there is none, which is left out.

    Raises:
        ValueError: there is no preference at all.
    """
    shares = preferences[~np.isnan(preferences)] - 1
    if not len(shares):
        raise ValueError("no preference to take a win rate from")
    wins, losses = int((shares > 0.5).sum()), int((shares < 0.5).sum())
    draws = len(shares) - wins - losses
    return WinRate(
        win_rate=100 * float(shares.mean()),
        standard_error=100 * standard_error(shares),
        discrete_win_rate=100 * (wins + draws / 2) / len(shares),
        wins=wins,
        losses=losses,
        draws=draws,
        n=len(shares),
    )


def standard_error(values: np.ndarray) -> float:
    """The standard error of the mean of ``values``, ``[N]``; NaN for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


# ---- The length-controlled win rate: what the win rate would be if both sides wrote answers of one length.


_FOLDS = 5


_GAMED_WEIGHT = 0.1  # of a row of either of the two gamed baselines


# Inverse strengths of the penalty that cross-validation chooses from.
STRENGTHS = np.logspace(-4, 4, 10)


@dataclass(frozen=True)
class Baselines:
    """What the benchmark has measured once, and every model is fitted with.

    Attributes:
        difficulties: ``[N]``, of the instructions in the benchmark's order.
        x: ``[G, 3]``, features of the gamed baselines' rows; the third is 0.
        y: ``[G]``, their preferences in [0, 1].
    """

    difficulties: np.ndarray
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class LengthControlled:
    """The length-controlled win rate in percent.

    Attributes:
        win_rate: mean over the instructions of the fitted preference at equal lengths.
        standard_error: of that mean; the fit is taken as given.
        coefficients: of length, difficulty and model, ``[3]``.
        strength: inverse strength of the penalty (scikit-learn's C); NaN where nothing was fitted.
    """

    win_rate: float
    standard_error: float
    coefficients: np.ndarray
    strength: float


def length_controlled(
    preferences: np.ndarray,
    baseline_lengths: np.ndarray,
    lengths: np.ndarray,
    baselines: Baselines,
    *,
    strength: float | None = None,
) -> LengthControlled:
    """Fit the benchmark's model to one model's preferences and predict at equal lengths.

    An instruction's difficulty is looked up by its position, as the benchmark does. The baseline itself has 50 by
    definition.

    Args:
        preferences: ``[N]`` in [1, 2] or NaN; rows without a preference are predicted but not fitted.
        baseline_lengths: characters of the baseline's answers, ``[N]``.
        lengths: characters of the model's answers, ``[N]``.
        baselines: difficulties and gamed rows; at least N difficulties.
        strength: inverse strength of the penalty; chosen by cross-validation if None.
    """
    difficulties = baselines.difficulties[: len(preferences)]
    if np.array_equal(baseline_lengths, lengths) and (preferences == 1.5).all():
        return LengthControlled(50.0, 0.0, np.zeros(3), float("nan"))
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
    return LengthControlled(100 * float(predicted.mean()), 100 * standard_error(predicted), coefficients, strength)


def predicted_preferences(difficulties: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Preferences ``[N]`` in [0, 1] at equal lengths, from the coefficients of length, difficulty and model."""
    return expit(coefficients[1] * difficulties + coefficients[2])


def cross_validated_strength(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The one of :data:`STRENGTHS` with the least weighted log loss on rows that were not fitted."""
    losses = np.zeros(len(STRENGTHS))
    for held_out in folds(len(y)):
        coefficients = None
        for index, strength in enumerate(STRENGTHS):
            fitted = ~held_out
            coefficients = fit_logistic(
                x[fitted], y[fitted], weights[fitted] * strength, penalty=1.0, start=coefficients
            )
            losses[index] += (weights[held_out] * log_loss(x[held_out], y[held_out], coefficients)).mean()
    return float(STRENGTHS[losses.argmin()])


def folds(n: int) -> Iterator[np.ndarray]:
    """Masks ``[n]`` of the held-out rows, fold by fold.

    scikit-learn's GroupKFold on groups of one size deals them out in turns, from the last to the first.
    """
    order = np.arange(n)[::-1]
    for fold in range(_FOLDS):
        yield order % _FOLDS == fold
