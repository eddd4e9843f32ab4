"""Held-out metrics before and after training, with intervals, for policies and for reward models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

from simpo.runs.lines import JsonLines
from simpo.runs.results import Metric, Stage
from simpo.statistics import (
    Interval,
    bootstrap_interval,
    mcnemar,
    mean_interval,
    proportion_interval,
    share_interval,
    weighted_mean_interval,
)
from simpo.training.batches import WEIGHT, Scores

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
    if not path.exists() or len(found := list(JsonLines(path))) != rows:
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
            metrics.append(Metric.of(f"eval_{name}", found, stage))
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
    metrics = [Metric.of("eval_loss", found, stage) for stage, found in losses]
    return metrics + [Metric.of("eval_perplexity", _exponential(found), stage) for stage, found in losses]


def _stages(before: Scores, after: Scores) -> Iterator[tuple[Stage, Scores]]:
    yield "before", before
    yield "after", after


def _exponential(found: Interval) -> Interval:
    value, low, high = (None if x is None else _exp(x) for x in (found.value, found.low, found.high))
    return Interval(value if value is not None else math.nan, low, high, found.n, found.method)


def _exp(x: float) -> float:
    return math.exp(x) if x < _LARGEST else math.inf


# ---- Held-out figures of reward models: how often they are right, for which lengths, and whether they know
# how often.


# Of every ordered pair, ``[rows, N]``, the better response less the worse; NaN where a row has fewer.
MARGINS, LENGTHS = "pair_margins", "pair_length_differences"


_BINS = 5  # of confidence, from 0.5 to 1


def compare_rewards(before: Scores, after: Scores) -> list[Metric]:
    """Means over the rows, the accuracy by what is longer, and how far confidence can be believed."""
    metrics = compare_preferences(_of_rows(before), _of_rows(after))
    stages: tuple[tuple[Stage, Scores], ...] = (("before", before), ("after", after))
    for stage, scores in stages:
        margins, lengths = scores[MARGINS], scores[LENGTHS]
        for name, found in [*_by_length(margins, lengths), *_calibration(margins)]:
            metrics.append(Metric.of(f"eval_{name}", found, stage))
    return metrics


def _of_rows(scores: Scores) -> Scores:
    return {name: values for name, values in scores.items() if values.ndim == 1}


def _by_length(margins: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[str, Interval]]:
    """Accuracy where the better response is the longer one, and where it is the shorter one."""
    for name, about in ((f"{ACCURACY}/chosen_longer", lengths > 0), (f"{ACCURACY}/chosen_shorter", lengths < 0)):
        yield name, _share(margins > 0, about)


def _calibration(margins: np.ndarray) -> Iterator[tuple[str, Interval]]:
    """Brier score, expected calibration error, and the accuracy of those whose confidence is in a bin.

    The Brier score (1950) is the mean of ``(1 - p)**2``: 0 at best, 0.25 for who always says 0.5. The expected
    calibration error is the mean difference of confidence and accuracy over the bins (Guo et al. 2017, arXiv
    1706.04599, equation 3), its rows resampled for its interval. Confidence is that in the higher reward.
    """
    there = ~np.isnan(margins)
    wrong = 1 / (1 + np.exp(np.clip(margins, -700, 700)))
    yield "brier", share_interval(np.nanmean(wrong**2, axis=1))
    confidence = np.maximum(wrong, 1 - wrong)
    bins = np.clip((np.nan_to_num(confidence) - 0.5) * 2 * _BINS, 0, _BINS - 1).astype(int)
    right = margins > 0
    in_bin = [there & (bins == number) for number in range(_BINS)]
    sums = [(where * values).sum(1) for where in in_bin for values in (np.nan_to_num(confidence), right)]
    yield "calibration_error", bootstrap_interval(np.stack([*sums, there.sum(1)], axis=1), _error, seed=0)
    for number, where in enumerate(in_bin):
        low = 0.5 + number / (2 * _BINS)
        yield f"calibration/{low:.1f}-{low + 0.5 / _BINS:.1f}", _share(right, where)


def _error(sums: np.ndarray) -> np.ndarray:
    """``[...]`` errors from sums ``[..., 2 * bins + 1]``: confidence and right ones of each bin, and all pairs."""
    confident, right = sums[..., :-1:2], sums[..., 1:-1:2]
    return np.abs(confident - right).sum(-1) / sums[..., -1]


def _share(right: np.ndarray, about: np.ndarray) -> Interval:
    """The share of the pairs ``about``, ``[rows, N]``, that are ``right``; pairs of one row are not independent."""
    n = int(about.sum())
    if not n:
        return Interval(np.nan, None, None, 0, "")
    if about.shape[1] == 1:
        return proportion_interval(int((right & about).sum()), n)
    rows = about.any(1)
    counts = about[rows].sum(1)
    found = share_interval((right & about)[rows].sum(1) / counts, counts)
    return Interval(found.value, found.low, found.high, n, found.method)
