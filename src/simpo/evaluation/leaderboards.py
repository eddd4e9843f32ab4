"""Leaderboard statistics from verdicts: AlpacaEval's win rates, Arena-Hard's scores and style control."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import expit

from simpo.evaluation.preferences import fit_logistic, is_determined, log_loss
from simpo.statistics import Interval, share_interval

# ---- AlpacaEval's win rate.


def win_rates(preferences: np.ndarray) -> dict[str, float]:
    """Raw and discrete win rate in percent, and numbers of instructions, under the leaderboard's names.

    ``preferences`` are ``[N]`` in [1, 2], 2 where the model is preferred; a draw is exactly 1.5 and counts half. The
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
    """The standard error of the mean of ``values``, ``[N]``; NaN for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


# ---- AlpacaEval's length-controlled win rate: the win rate if both sides wrote answers of the same length.

_FOLDS = 5
_GAMED_WEIGHT = 0.1  # of each row of the two gamed baselines
# Inverse strengths of the penalty that cross-validation chooses from.
STRENGTHS = np.logspace(-4, 4, 10)


class Baselines(NamedTuple):
    """Constants that the benchmark measured once and uses in the fit of every model."""

    difficulties: np.ndarray  # [N], of the instructions in the benchmark's order
    x: np.ndarray  # [G, 3], features of the gamed baselines' rows; the third is 0
    y: np.ndarray  # [G], their preferences in [0, 1]


class LengthControlled(NamedTuple):
    """The length-controlled win rate in percent."""

    win_rate: float  # mean over the instructions of the fitted preference at equal lengths
    standard_error: float  # of that mean; the fit is taken as given
    coefficients: np.ndarray  # [3], of length, difficulty and model


def length_controlled(
    preferences: np.ndarray,
    baseline_lengths: np.ndarray,
    lengths: np.ndarray,
    baselines: Baselines,
    *,
    strength: float | None = None,
) -> LengthControlled:
    """Fit the benchmark's logistic model to one model's preferences and predict them at equal lengths.

    An instruction's difficulty is looked up by its position, as in the benchmark. The baseline itself has 50 by
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
    """Preferences ``[N]`` in [0, 1] at equal lengths, from the coefficients of length, difficulty and model."""
    return expit(coefficients[1] * difficulties + coefficients[2])


def cross_validated_strength(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The one of :data:`STRENGTHS` with the lowest weighted log loss on held-out rows."""
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
    """Masks ``[n]`` of the held-out rows, fold by fold.

    scikit-learn's GroupKFold assigns groups of equal size to the folds in turn, from the last to the first.
    """
    order = np.arange(n)[::-1]
    for fold in range(_FOLDS):
        yield order % _FOLDS == fold


# ---- Arena-Hard's scores.
#
# The benchmark fits Bradley-Terry strengths by unpenalized logistic regression. Every battle has the baseline on one
# side, and therefore a model's fitted chance to win is the mean worth of its battles, which is what is computed here.

Version = Literal["v0.1", "v2"]

_RESAMPLES = 100
_PERCENTILES: dict[Version, tuple[float, float]] = {"v0.1": (2.5, 97.5), "v2": (5, 95)}


def bootstrap_score(prompts: Sequence[Sequence[float]], version: Version, seed: int = 42) -> Interval:
    """The benchmark's score in percent and its bootstrap interval.

    Battles are drawn independently, although those of one prompt, and the three of a strong verdict, are not
    independent. That makes the interval narrower than stated; :func:`score_over_prompts` is the one to trust. v0.1
    reports the mean of the battles with the 2.5th and 97.5th percentiles, v2 the mean of the bootstrap means with the
    5th and 95th.

    ``prompts`` has the worth of each of a prompt's battles, from 0 to 1.
    """
    worths = np.concatenate([np.asarray(worths, dtype=np.float64) for worths in prompts])
    draws = np.random.default_rng(seed).integers(len(worths), size=(_RESAMPLES, len(worths)))
    means = worths[draws].mean(axis=1)
    percentiles = _PERCENTILES[version]
    low, high = np.percentile(means, percentiles)
    value = worths.mean() if version == "v0.1" else means.mean()
    method = "bootstrap of battles, {:g} to {:g}%".format(*percentiles)
    return Interval(100 * float(value), 100 * float(low), 100 * float(high), len(prompts), method)


def score_over_prompts(prompts: Sequence[Sequence[float]]) -> Interval:
    """The mean worth of the battles in percent, with a 95% interval in which a prompt is one observation.

    ``prompts`` has the worth of each of a prompt's battles, at least one each.
    """
    found = share_interval([float(np.mean(worths)) for worths in prompts], [len(worths) for worths in prompts])
    low, high = (None if bound is None else 100 * bound for bound in (found.low, found.high))
    return Interval(100 * found.value, low, high, found.n, f"over prompts: {found.method}")


# ---- Arena-Hard's style control: the score if the model's answers had the style of the baseline's.

_CODE = re.compile(r"```[^`]*```")
_HEADERS = re.compile(r"^#{1,6}\s", re.MULTILINE)
_LISTS = re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


def style_of(text: str, length: int | None = None) -> tuple[int, ...]:
    """An answer's length, in characters unless given in another unit, and its numbers of headers, list items and bold
    passages outside code blocks."""
    prose = _CODE.sub("", text)
    counts = (len(pattern.findall(prose)) for pattern in (_HEADERS, _LISTS, _BOLD))
    return len(text) if length is None else length, *counts


def style_differences(model: Sequence[tuple[int, ...]], baseline: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Features ``[N, 4]``: relative differences in length and in the densities of headers, lists and bold text."""
    ours, theirs = (np.array(styles, dtype=np.float64) for styles in (model, baseline))
    total = ours[:, :1] + theirs[:, :1]
    length = np.divide(ours[:, :1] - theirs[:, :1], total, out=np.zeros_like(total), where=total > 0)
    mine, other = (counts[:, 1:] / (counts[:, :1] + 1) for counts in (ours, theirs))
    return np.hstack([length, (mine - other) / (mine + other + 1)])


class StyleControlled(NamedTuple):
    """Chances to beat the baseline, in percent; NaN where style or model determines so much that there is no fit."""

    at_mean: (
        np.ndarray
    )  # [M], at the mean style difference of all battles: the leaderboard's, which depends on all models
    at_equal: np.ndarray  # [M], with answers in the baseline's style
    coefficients: np.ndarray  # [4], of the features, in standard deviations


def style_controlled(models: np.ndarray, worths: np.ndarray, features: np.ndarray) -> StyleControlled:
    """Fit Bradley-Terry strengths and the effects of style together.

    Args:
        models: the model of each battle, numbers from 0 to M - 1, ``[N]``.
        worths: of the battles to the models, ``[N]`` in [0, 1].
        features: of :func:`style_differences`, ``[N, 4]``.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0, ddof=1)
    deviation[deviation == 0] = 1  # a feature that is equal in all battles explains nothing
    known = np.eye(models.max() + 1)[models]
    x = np.hstack([known, (features - mean) / deviation])
    w = fit_logistic(x, worths)
    if not is_determined(x, w):
        w = np.full(len(w), np.nan)
    strengths, effects = np.split(w, [known.shape[1]])
    return StyleControlled(100 * expit(strengths), 100 * expit(strengths - effects @ (mean / deviation)), effects)
