"""Annotations -> the leaderboard's figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from simpo.evaluation.alpaca_eval.files import Annotation
from simpo.evaluation.alpaca_eval.length_control import Baselines, length_controlled
from simpo.evaluation.alpaca_eval.win_rate import win_rate
from simpo.evaluation.asking import Say
from simpo.results import Metric
from simpo.statistics import share_bounds


def figures(annotations: Sequence[Annotation], baselines: Baselines | None, say: Say) -> list[Metric]:
    """The leaderboard's figures under its names, and how many answers were empty or got no preference.

    Intervals are those of 1.96 standard errors, kept within 0 to 100: of the mean for the win rate, and of the mean of
    the predicted preferences for the length-controlled one. There are difficulties of all instructions.
    """
    found = np.array([annotation.preference for annotation in annotations])
    unparsed = int(np.isnan(found).sum())
    ours = [annotation.match.output_2 for annotation in annotations]
    empty = sum(not text.strip() for text in ours)
    if unparsed:
        say(f"note: {unparsed} of {len(found)} answers got no preference and are left out")
    if empty:
        say(f"note: {empty} of {len(found)} answers are empty; they were judged like any other")
    judged = unparsed < len(found)
    return [
        *(_controlled(annotations, found, baselines) if judged and baselines is not None else ()),
        *(_raw(found) if judged else [Metric("alpaca_eval/win_rate", None, n=0)]),
        Metric("alpaca_eval/avg_length", int(np.mean([len(text) for text in ours])), n=len(found)),
        Metric("alpaca_eval/without_preference", unparsed, n=len(found)),
        Metric("alpaca_eval/empty_answers", empty, n=len(found)),
    ]


def _raw(found: np.ndarray) -> list[Metric]:
    raw = win_rate(found)
    return [
        _metric("win_rate", raw.win_rate, raw.standard_error, raw.n),
        Metric("alpaca_eval/standard_error", raw.standard_error, n=raw.n),
        Metric("alpaca_eval/discrete_win_rate", raw.discrete_win_rate, n=raw.n),
        Metric("alpaca_eval/n_wins", raw.wins, n=raw.n),
        Metric("alpaca_eval/n_draws", raw.draws, n=raw.n),
        Metric("alpaca_eval/n_wins_base", raw.losses, n=raw.n),
    ]


def _controlled(annotations: Sequence[Annotation], found: np.ndarray, baselines: Baselines) -> list[Metric]:
    theirs, ours = (
        np.array([len(text) for text in texts])
        for texts in zip(*((row.match.output_1, row.match.output_2) for row in annotations), strict=True)
    )
    controlled = length_controlled(found, theirs, ours, baselines)
    return [
        _metric("length_controlled_winrate", controlled.win_rate, controlled.standard_error, len(found)),
        Metric("alpaca_eval/lc_standard_error", controlled.standard_error, n=len(found)),
    ]


def _metric(name: str, value: float, error: float, n: int) -> Metric:
    if math.isnan(error):
        return Metric(f"alpaca_eval/{name}", value, n=n)
    low, high = share_bounds(value / 100, 1.96 * error / 100)
    return Metric(f"alpaca_eval/{name}", value, None, n, 100 * low, 100 * high, "Wilson, 1.96 standard errors")
