"""Scores of battles against a baseline: verdicts, Bradley-Terry, style control, intervals.

The benchmark fits Bradley-Terry strengths by unpenalised logistic regression. Every battle has the baseline on one
side, so that a model's fitted chance to win is the mean worth of its battles, which is what is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit

from simpo.evaluation.preferences import fit_logistic, is_determined
from simpo.generation.thinking import after_thinking
from simpo.statistics import Interval, share_interval

# ---- Verdicts in a judge's words, and the battles that they count as.


Version = Literal["v0.1", "v2"]


_MARKED = re.compile(r"\[\[([AB<>=]+)\]\]")


_LOOSELY_MARKED = re.compile(r"\[([AB<>=]+)\]")


_STRONG = 3  # battles that a strong verdict counts as


# What each verdict is worth to the answer that is shown first.
_WORTH = {"A>>B": (1.0, _STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, _STRONG)}


_OTHER_WAY_ROUND = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}


def read_verdict(text: str, version: Version) -> str | None:
    """One of ``A>>B``, ``A>B``, ``A=B``, ``B>A`` and ``B>>A``; None where the judge gave none.

    v0.1 takes the verdict in double brackets if there is one only, or the same one several times. v2 takes the last, in
    any case, in single brackets where there is none in double ones, and written either way round. What the judge wrote
    while it was thinking does not count.
    """
    text = after_thinking(text) or ""
    if version == "v0.1":
        found = set(_MARKED.findall(text))
        return found.pop() if len(found) == 1 and found <= _WORTH.keys() else None
    matches = _MARKED.findall(text.upper()) or _LOOSELY_MARKED.findall(text.upper())
    last = matches[-1] if matches else ""
    verdict = _OTHER_WAY_ROUND.get(last, last)
    return verdict if verdict in _WORTH else None


def battles(first: str | None, second: str | None, version: Version) -> list[float]:
    """What a prompt's games are worth to the model, a number in [0, 1] for each battle.

    Args:
        first: verdict of the game in which the baseline is shown first.
        second: of the one in which the model is.
        version: v0.1 counts a game whose counterpart has no verdict, v2 does not.
    """
    if version == "v2" and (first is None or second is None):
        return []
    return [1 - share for share in _shares(first)] + _shares(second)


def _shares(verdict: str | None) -> list[float]:
    if verdict is None:
        return []
    share, count = _WORTH[verdict]
    return [share] * count


_ROUNDS = 100


_PERCENTILES: dict[Version, tuple[float, float]] = {"v0.1": (2.5, 97.5), "v2": (5, 95)}


def score(prompts: Sequence[Sequence[float]], version: Version, seed: int = 42) -> Interval:
    """The benchmark's score in percent and its bootstrap interval.

    Battles are drawn one by one, those of one prompt and the three of a strong verdict too, as if they were
    independent. That makes the interval narrower than its name says; :func:`score_over_prompts` is the one to trust.
    v0.1 has the mean of the battles and the 2.5th and 97.5th percentile, v2 the mean of the bootstrap means and the
    5th and 95th.

    Args:
        prompts: the worths of each prompt's battles.
        version: of the benchmark.
        seed: of the bootstrap.
    """
    worths = np.concatenate([np.asarray(worths, dtype=np.float64) for worths in prompts])
    draws = np.random.default_rng(seed).integers(len(worths), size=(_ROUNDS, len(worths)))
    means = worths[draws].mean(axis=1)
    percentiles = _PERCENTILES[version]
    low, high = np.percentile(means, percentiles)
    value = worths.mean() if version == "v0.1" else means.mean()
    method = "bootstrap of battles, {:g} to {:g}%".format(*percentiles)
    return Interval(100 * float(value), 100 * float(low), 100 * float(high), len(prompts), method)


def score_over_prompts(prompts: Sequence[Sequence[float]]) -> Interval:
    """The mean worth of the battles in percent, with a 95% interval that takes a prompt as one observation.

    Args:
        prompts: the worths of each prompt's battles, at least one each.
    """
    found = share_interval([float(np.mean(worths)) for worths in prompts], [len(worths) for worths in prompts])
    low, high = (None if bound is None else 100 * bound for bound in (found.low, found.high))
    return Interval(100 * found.value, low, high, found.n, f"over prompts: {found.method}")


# ---- Style control: how a model would do if its answers looked like the baseline's.


_CODE = re.compile(r"```[^`]*```")


_HEADERS = re.compile(r"^#{1,6}\s", re.MULTILINE)


_LISTS = re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE)


_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


@dataclass(frozen=True)
class Style:
    """An answer's length and how often it has headers, list items and bold text outside code blocks."""

    length: int
    headers: int
    lists: int
    bold: int


def style_of(text: str, length: int | None = None) -> Style:
    """The style of an answer; its length in characters unless it is given in another unit."""
    prose = _CODE.sub("", text)
    counts = (len(pattern.findall(prose)) for pattern in (_HEADERS, _LISTS, _BOLD))
    return Style(len(text) if length is None else length, *counts)


def style_differences(model: Sequence[Style], baseline: Sequence[Style]) -> np.ndarray:
    """Features ``[N, 4]``: relative difference in length, and in the densities of headers, lists and bold text."""
    ours, theirs = (
        np.array([[style.length, style.headers, style.lists, style.bold] for style in styles], dtype=np.float64)
        for styles in (model, baseline)
    )
    total = ours[:, :1] + theirs[:, :1]
    length = np.divide(ours[:, :1] - theirs[:, :1], total, out=np.zeros_like(total), where=total > 0)
    mine, other = (counts[:, 1:] / (counts[:, :1] + 1) for counts in (ours, theirs))
    return np.hstack([length, (mine - other) / (mine + other + 1)])


@dataclass(frozen=True)
class StyleControlled:
    """Chances to beat the baseline, in percent; NaN where style, or who plays, explains so much that there is no fit.

    Attributes:
        at_mean: by model, ``[M]``, at the mean style difference of all battles: the leaderboard's figure, which depends
            on who else is on it.
        at_equal: by model, ``[M]``, with answers in the baseline's style.
        coefficients: of the four features, in standard deviations.
    """

    at_mean: np.ndarray
    at_equal: np.ndarray
    coefficients: np.ndarray


def style_controlled(models: np.ndarray, worths: np.ndarray, features: np.ndarray) -> StyleControlled:
    """Fit Bradley-Terry strengths and the effects of style together.

    Args:
        models: which model each battle is of, numbers from 0 to M - 1, ``[N]``.
        worths: of the battles to the models, ``[N]`` in [0, 1].
        features: of :func:`style_differences`, ``[N, 4]``.
    """
    mean, deviation = features.mean(axis=0), features.std(axis=0, ddof=1)
    deviation[deviation == 0] = 1  # a feature in which all battles are alike explains nothing
    known = np.eye(models.max() + 1)[models]
    x = np.hstack([known, (features - mean) / deviation])
    w = fit_logistic(x, worths)
    if not is_determined(x, w):
        w = np.full(len(w), np.nan)
    strengths, effects = np.split(w, [known.shape[1]])
    return StyleControlled(100 * expit(strengths), 100 * expit(strengths - effects @ (mean / deviation)), effects)
