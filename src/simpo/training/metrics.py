"""Metrics of rows: running means while training, scores of a data set, and held-out results with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from simpo.runs.files import read_lines, write_lines
from simpo.runs.manifest import is_intact, write_digest
from simpo.runs.results import Metric, Stage
from simpo.statistics import (
    Interval,
    bootstrap_interval,
    mcnemar,
    mean_interval,
    proportion_interval,
    share_interval,
)
from simpo.training.batches import widest_float

# Metrics of every row of a data set, in its order: ``[rows]`` by name, and WEIGHT.
Scores = dict[str, np.ndarray]
WEIGHT = "weight"
ACCURACY = "rewards/accuracies"
# Differences between the better and the worse response of every ordered pair, ``[rows, N]``; NaN for missing pairs.
MARGINS, LENGTHS = "pair_margins", "pair_length_differences"
TOKENS = "tokens"  # in files: of every response of a row
_BINS = 5  # for the confidence, from 0.5 to 1


class RunningMeans:
    """Weighted means of rows' metrics since the last log and since the start, without waiting for the device.

    A metric that is NaN does not apply to its row, and its mean is over the other rows; the loss always counts.
    ``names`` are the ``N`` metrics, the loss first; ``device`` holds this rank's sums.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        # [2, N] sums of metrics and of the weights that they count with
        self._since_log = torch.zeros(2, len(names), device=device, dtype=widest_float(device))
        self._before_log = torch.zeros(2, len(names), dtype=torch.float64)  # sums over all ranks up to the last log

    def add(self, metrics: Tensor, weights: Tensor) -> None:
        """Count rows' ``metrics``, ``[C, N]``, with ``weights``, ``[C]``."""
        sums = self._since_log
        metrics, weights = metrics.to(sums), weights.to(sums, non_blocking=True)
        missing = metrics.isnan()
        missing[:, 0] = False
        sums += torch.stack([weights @ metrics.masked_fill(missing, 0), weights @ (~missing).to(sums)])

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call, over all ranks; metrics without rows are left out. ``reduce`` sums over ranks."""
        taken = reduce(self._since_log.clone()).cpu().double()
        self._since_log.zero_()
        self._before_log += taken
        return self._means(taken)

    def overall(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the start, over all ranks and, after a resume, over the whole run."""
        return self._means(self._before_log + reduce(self._since_log.clone()).cpu().double())

    def running(self, name: str, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """``[]`` what :meth:`overall` has for ``name``, on the device; 0 where there are no rows yet."""
        sums = self._before_log.to(self._since_log, non_blocking=True) + reduce(self._since_log.clone())
        total, weight = sums[:, self._names.index(name)]
        return torch.where(weight > 0, total / weight.clamp(min=torch.finfo(weight.dtype).tiny), 0)

    def _means(self, sums: Tensor) -> dict[str, float]:
        columns = zip(self._names, *sums.tolist(), strict=True)
        return {name: total / weight for name, total, weight in columns if weight}

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The state that :meth:`restore` needs, as JSON; the same on every rank."""
        return {"since_log": reduce(self._since_log.clone()).tolist(), "before_log": self._before_log.tolist()}

    def restore(self, state: dict[str, Any], *, main: bool) -> None:
        """Continue from ``state``; the main rank takes the sums of all ranks."""
        since_log = self._since_log.new_tensor(state["since_log"])
        self._since_log = since_log if main else torch.zeros_like(since_log)
        self._before_log = torch.tensor(state["before_log"], dtype=torch.float64)


def write_scores(path: Path, rows: Dataset, scores: Scores) -> None:
    """Write the scores of ``rows`` as JSON lines, each with the place of its row and its responses' tokens."""
    places = rows["where"] if "where" in rows.column_names else [None] * len(rows)
    tokens = [[len(ids) for ids in responses] for responses in rows["response_ids"]]
    columns = zip(*(values.tolist() for values in scores.values()), strict=True)
    records = (
        {"where": place, TOKENS: counts, **dict(zip(scores, row, strict=True))}
        for place, counts, row in zip(places, tokens, columns, strict=True)
    )
    write_lines(path, records)
    write_digest(path)


def read_scores(path: Path, rows: int) -> Scores | None:
    """The scores that :func:`write_scores` wrote; None if there are not ``rows`` of them, or if they were changed."""
    if not is_intact(path) or len(lines := read_lines(path)) != rows:
        return None
    names = [name for name in lines[0] if name not in ("where", TOKENS)]
    return {name: np.array([line[name] for line in lines], dtype=np.float64) for name in names}


# ---- Held-out results before and after training.


def _stages(before: Scores, after: Scores) -> Iterator[tuple[Stage, Scores]]:
    yield "before", before
    yield "after", after


def compare_preferences(before: Scores, after: Scores, *, has_reference: bool = False) -> list[Metric]:
    """Means over the rows that a metric applies to, before and after.

    For pairs also a test whether the rise in accuracy is chance; for single responses the area under the ROC curve, the
    share of all (desirable, undesirable) combinations in which the desirable response has the larger reward.

    Args:
        before: scores of the start model.
        after: scores of the trained model.
        has_reference: the reward compares with the start model, so that all rewards are 0 before training, up to
            rounding. Which of two is larger then is noise: the accuracy before and its rise are left out.
    """
    metrics = []
    unpaired = ACCURACY not in before
    pairs = not unpaired and all(np.isin(scores[ACCURACY], (0.0, 1.0)).all() for scores in (before, after))
    for name in before:
        if name == WEIGHT or before[name].ndim > 1:
            continue
        rows = ~np.isnan(before[name]) if unpaired else slice(None)
        for stage, scores in _stages(before, after):
            if has_reference and stage == "before" and name == ACCURACY:
                continue
            values = scores[name][rows]
            if name != ACCURACY:
                found = mean_interval(values)
            elif pairs:
                found = proportion_interval(int(values.sum()), len(values))
            else:  # a ranking has several pairs and may be right in part
                found = share_interval(values)
            metrics.append(Metric.of(f"eval_{name}", found, stage))
    if pairs and not has_reference:
        p = mcnemar(before[ACCURACY].astype(bool), after[ACCURACY].astype(bool))
        metrics.append(Metric(f"eval_{ACCURACY}/p_value", p, n=len(before[ACCURACY]), method="McNemar, one-sided"))
    if unpaired:
        metrics += [] if has_reference else [_area_under_roc("before", before)]
        metrics.append(_area_under_roc("after", after))
    return metrics


def _area_under_roc(stage: Stage, scores: Scores) -> Metric:
    desirable, undesirable = (
        np.sort(values[~np.isnan(values)]) for values in (scores["rewards/chosen"], scores["rewards/rejected"])
    )
    below = np.searchsorted(undesirable, desirable, "left") + np.searchsorted(undesirable, desirable, "right")
    combinations = len(desirable) * len(undesirable)
    area = float(below.sum() / (2 * combinations)) if combinations else math.nan  # ties count half
    return Metric("eval_rewards/auc", area, stage, len(desirable) + len(undesirable))


def compare_conversations(before: Scores, after: Scores) -> list[Metric]:
    """Mean loss over the scored tokens, in nats, and the perplexity, its exponential."""
    losses = {stage: mean_interval(scores["loss"], scores[WEIGHT]) for stage, scores in _stages(before, after)}
    metrics = [Metric.of("eval_loss", found, stage) for stage, found in losses.items()]
    for stage, found in losses.items():
        value, low, high = (None if x is None else _exp(x) for x in (found.value, found.low, found.high))
        perplexity = Interval(math.nan if value is None else value, low, high, found.n, found.method)
        metrics.append(Metric.of("eval_perplexity", perplexity, stage))
    return metrics


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # math.exp(710) would be an OverflowError


def compare_rewards(before: Scores, after: Scores) -> list[Metric]:
    """Means over the rows, the accuracy by which response is longer, and how well confidence is calibrated.

    The Brier score (1950) is the mean of ``(1 - p)**2``: 0 at best, 0.25 for a model that always predicts 0.5. The
    expected calibration error is the mean difference between confidence and accuracy over the bins (Guo et al. 2017,
    arXiv 1706.04599, equation 3), with rows resampled for its interval. Confidence is the probability of the higher
    reward.
    """
    metrics = compare_preferences(before, after)
    for stage, scores in _stages(before, after):
        margins, lengths = scores[MARGINS], scores[LENGTHS]
        right = margins > 0
        for name, longer in ((f"{ACCURACY}/chosen_longer", lengths > 0), (f"{ACCURACY}/chosen_shorter", lengths < 0)):
            metrics.append(Metric.of(f"eval_{name}", _share(right, longer), stage))
        metrics += [Metric.of(f"eval_{name}", found, stage) for name, found in _calibration(margins, right)]
    return metrics


def _calibration(margins: np.ndarray, right: np.ndarray) -> Iterator[tuple[str, Interval]]:
    """Brier score, expected calibration error, and the accuracy of each bin of confidence."""
    exists = ~np.isnan(margins)
    wrong = 1 / (1 + np.exp(np.clip(margins, -700, 700)))  # probability of the worse response
    yield "brier", share_interval(np.nanmean(wrong**2, axis=1))
    confidence = np.nan_to_num(np.maximum(wrong, 1 - wrong))
    bins = np.clip((confidence - 0.5) * 2 * _BINS, 0, _BINS - 1).astype(int)
    in_bin = [exists & (bins == number) for number in range(_BINS)]
    sums = [(where * values).sum(1) for where in in_bin for values in (confidence, right)]

    def error(sums: np.ndarray) -> np.ndarray:
        """``[...]`` errors from sums ``[..., 2 * bins + 1]``: confidence and right pairs of each bin, and all pairs."""
        return np.abs(sums[..., :-1:2] - sums[..., 1:-1:2]).sum(-1) / sums[..., -1]

    yield "calibration_error", bootstrap_interval(np.stack([*sums, exists.sum(1)], axis=1), error, seed=0)
    for number, where in enumerate(in_bin):
        low = 0.5 + number / (2 * _BINS)
        yield f"calibration/{low:.1f}-{low + 0.5 / _BINS:.1f}", _share(right, where)


def _share(right: np.ndarray, counted: np.ndarray) -> Interval:
    """The share of the ``counted`` pairs, ``[rows, N]``, that are ``right``; pairs of one row are not independent."""
    n = int(counted.sum())
    if not n:
        return Interval(np.nan, None, None, 0, "")
    if counted.shape[1] == 1:
        return proportion_interval(int((right & counted).sum()), n)
    rows = counted.any(1)
    counts = counted[rows].sum(1)
    found = share_interval((right & counted)[rows].sum(1) / counts, counts)
    return Interval(found.value, found.low, found.high, n, found.method)
