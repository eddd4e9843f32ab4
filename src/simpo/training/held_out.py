"""Held-out figures before and after training, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

from simpo.results import Metric, Stage
from simpo.runs.lines import JsonLines
from simpo.statistics import (
    Interval,
    mcnemar,
    mean_interval,
    proportion_interval,
    share_interval,
    weighted_mean_interval,
)
from simpo.training.scores import WEIGHT, Scores

ACCURACY = "rewards/accuracies"
_LARGEST = 700.0  # whose exponential is a number


def write_scores(path: Path, rows: Dataset, scores: Scores) -> None:
    """Keep the scores of ``rows`` as JSON lines, each with where its row comes from."""
    places = rows["where"] if "where" in rows.column_names else [None] * len(rows)
    columns = zip(*(values.tolist() for values in scores.values()), strict=True)
    lines = JsonLines(path)
    lines.keep(0)
    lines.append(
        {"where": place, **dict(zip(scores, row, strict=True))} for place, row in zip(places, columns, strict=True)
    )


def read_scores(path: Path, rows: int) -> Scores | None:
    """What :func:`write_scores` kept; None if there are not ``rows`` of them."""
    if not path.exists() or len(found := JsonLines(path).read()) != rows:
        return None
    return {name: np.array([line[name] for line in found], dtype=np.float64) for name in found[0] if name != "where"}


def compare_preferences(before: Scores, after: Scores, *, has_reference: bool = False) -> list[Metric]:
    """Means over the rows, of responses that are judged alone over those that a figure is about.

    Of pairs also whether the rise in accuracy is chance; of responses that are judged alone the share of desirable ones
    with a larger reward than an undesirable one, over all such couples.

    Args:
        before: scores of the start model.
        after: scores of the trained one.
        has_reference: the reward compares with the start model, so that before all rewards are 0 up to rounding. Which
            of two is the larger then is noise: it is left out, and with it whether accuracy rose.
    """
    metrics = []
    unpaired = ACCURACY not in before
    pairs = not unpaired and all(np.isin(scores[ACCURACY], (0.0, 1.0)).all() for scores in (before, after))
    for name in (name for name in before if name != WEIGHT):
        about = ~np.isnan(before[name]) if unpaired else slice(None)
        for stage, scores in _stages(before, after):
            if has_reference and stage == "before" and name == ACCURACY:
                continue
            values = scores[name][about]
            shares = pairs and name == ACCURACY  # else a comparison of several pairs may be right in part
            interval = share_interval if name == ACCURACY else mean_interval
            found = proportion_interval(int(values.sum()), len(values)) if shares else interval(values)
            metrics.append(_metric(f"eval_{name}", stage, found))
    if pairs and not has_reference:
        test = mcnemar(before[ACCURACY].astype(bool), after[ACCURACY].astype(bool))
        metrics.append(Metric(f"eval_{ACCURACY}/p_value", test.p, n=len(before[ACCURACY]), method="McNemar, one-sided"))
    if unpaired:
        metrics += [] if has_reference else [_ordered("before", before)]
        metrics.append(_ordered("after", after))
    return metrics


def _ordered(stage: Stage, scores: Scores) -> Metric:
    """Area under the ROC curve of the reward."""
    desirable, undesirable = (
        np.sort(values[~np.isnan(values)]) for values in (scores["rewards/chosen"], scores["rewards/rejected"])
    )
    below = np.searchsorted(undesirable, desirable, "left") + np.searchsorted(undesirable, desirable, "right")
    couples = len(desirable) * len(undesirable)
    share = float(below.sum() / (2 * couples)) if couples else math.nan  # ties count half
    return Metric("eval_rewards/auc", share, stage, len(desirable) + len(undesirable))


def compare_conversations(before: Scores, after: Scores) -> list[Metric]:
    """Mean loss over the scored tokens, in nats, and the perplexity, its exponential."""
    losses = [
        (stage, weighted_mean_interval(scores["loss"], scores[WEIGHT])) for stage, scores in _stages(before, after)
    ]
    metrics = [_metric("eval_loss", stage, found) for stage, found in losses]
    return metrics + [_metric("eval_perplexity", stage, _exponential(found)) for stage, found in losses]


def _stages(before: Scores, after: Scores) -> Iterator[tuple[Stage, Scores]]:
    yield "before", before
    yield "after", after


def _metric(name: str, stage: Stage, found: Interval) -> Metric:
    return Metric(name, found.value, stage, found.n, found.low, found.high, found.method)


def _exponential(found: Interval) -> Interval:
    value, low, high = (None if x is None else _exp(x) for x in (found.value, found.low, found.high))
    return Interval(value if value is not None else math.nan, low, high, found.n, found.method)


def _exp(x: float) -> float:
    return math.exp(x) if x < _LARGEST else math.inf
