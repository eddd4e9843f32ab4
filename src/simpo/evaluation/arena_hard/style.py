"""Style control: how a model would do if its answers looked like the baseline's.

Source: lmarena's arena-hard-auto, which follows the style control of Chatbot Arena: length and the density of Markdown
become features of a Bradley-Terry model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from simpo.evaluation.logistic import fit_logistic, is_determined

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
