"""Ratings in a judge's words, and their means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from simpo.results import Metric
from simpo.statistics import Interval, mean_interval, weighted_mean_interval
from simpo.thinking import after_thinking

_MARKED = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_LOOSELY_MARKED = re.compile(r"\[(\d+\.?\d*)\]")
_BEST = 10


@dataclass(frozen=True)
class Rating:
    """What the judge gave a turn; ``score`` is None where it gave nothing."""

    question_id: int
    category: str
    turn: int
    score: float | None


def read_rating(text: str) -> float | None:
    """The first number in double brackets or, where there is none, in single ones; None without either.

    A number above 10 is no rating: single brackets also hold years and references. Numbers in the judge's thinking do
    not count.
    """
    text = after_thinking(text) or ""
    found = _MARKED.search(text) or _LOOSELY_MARKED.search(text)
    return float(found[1]) if found and float(found[1]) <= _BEST else None


def rating_metrics(ratings: Sequence[Rating]) -> list[Metric]:
    """Means by turn and by category, and the pooled mean of all turns.

    Turns of one conversation are not independent: in pooled means a conversation is one observation.
    """
    rated = [rating for rating in ratings if rating.score is not None]
    metrics = [_metric("average", _pooled(rated)) if rated else Metric("mt_bench/average", None, n=0)]
    for turn in sorted({rating.turn for rating in rated}):
        scores = [rating.score for rating in rated if rating.turn == turn and rating.score is not None]
        metrics.append(_metric(f"turn_{turn}", mean_interval(scores)))
    for category in dict.fromkeys(rating.category for rating in rated):
        metrics.append(_metric(category, _pooled([rating for rating in rated if rating.category == category])))
    return [*metrics, Metric("mt_bench/without_rating", len(ratings) - len(rated), n=len(ratings))]


def _pooled(ratings: Sequence[Rating]) -> Interval:
    scores: dict[int, list[float]] = {}
    for rating in ratings:
        if rating.score is not None:
            scores.setdefault(rating.question_id, []).append(rating.score)
    means = [sum(found) / len(found) for found in scores.values()]
    return weighted_mean_interval(means, [len(found) for found in scores.values()])


def _metric(name: str, found: Interval) -> Metric:
    return Metric(f"mt_bench/{name}", found.value, None, found.n, found.low, found.high, found.method)
