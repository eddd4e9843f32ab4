"""Metrics: running means during training, scores of a dataset, and held-out results with intervals."""

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

# Metrics of every row of a dataset, in order: ``[rows]`` by name, including WEIGHT.
Scores = dict[str, np.ndarray]
WEIGHT = "weight"
ACCURACY = "rewards/accuracies"
# Better minus worse response, for every ordered pair, ``[rows, N]``; NaN where a row has fewer pairs.
MARGINS, LENGTHS = "pair_margins", "pair_length_differences"
TOKENS = "tokens"  # in files: the number of tokens of every response
_BINS = 5  # bins of confidence, from 0.5 to 1


class RunningMeans:
    """Weighted means of per-row metrics since the last log and since the start, without synchronizing the device.

    NaN means that a metric does not apply to a row, and its mean is over the other rows; the loss always counts.
    ``names`` are the ``N`` metrics, the loss first; ``device`` holds this rank's sums.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        # [2, N]: sums of the weighted metrics and of their weights
        self._since_log = torch.zeros(2, len(names), device=device, dtype=widest_float(device))
        self._before_log = torch.zeros(2, len(names), dtype=torch.float64)  # over all ranks, up to the last log

    def add(self, metrics: Tensor, weights: Tensor) -> None:
        """Add the ``metrics`` ``[C, N]`` of rows with ``weights`` ``[C]``."""
        sums = self._since_log
        metrics, weights = metrics.to(sums), weights.to(sums, non_blocking=True)
        missing = metrics.isnan()
        missing[:, 0] = False
        sums += torch.stack([weights @ metrics.masked_fill(missing, 0), weights @ (~missing).to(sums)])

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return means since the last call over all ranks, without metrics that have no rows; ``reduce`` sums ranks."""
        taken = reduce(self._since_log.clone()).cpu().double()
        self._since_log.zero_()
        self._before_log += taken
        return self._means(taken)

    def overall(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return means since the start over all ranks, including the part of the run before a resume."""
        return self._means(self._before_log + reduce(self._since_log.clone()).cpu().double())

    def running(self, name: str, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the overall mean of ``name``, ``[]``, on the device; 0 if there are no rows yet."""
        sums = self._before_log.to(self._since_log, non_blocking=True) + reduce(self._since_log.clone())
        total, weight = sums[:, self._names.index(name)]
        return torch.where(weight > 0, total / weight.clamp(min=torch.finfo(weight.dtype).tiny), 0)

    def _means(self, sums: Tensor) -> dict[str, float]:
        columns = zip(self._names, *sums.tolist(), strict=True)
        return {name: total / weight for name, total, weight in columns if weight}

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the state for :meth:`restore`, ready for JSON and the same on every rank."""
        sums = {"since_log": reduce(self._since_log.clone()).tolist(), "before_log": self._before_log.tolist()}
        return {"names": list(self._names), **sums}

    def restore(self, state: dict[str, Any], *, main: bool) -> None:
        """Continue from ``state``; the main rank takes over the sums of all ranks.

        Metrics are matched by name, and those that ``state`` does not have start at 0. Raises ValueError unless
        ``state`` has sums for as many metrics as names; without names, it must have the metrics of this run.
        """
        names = state.get("names", self._names)
        since_log, self._before_log = (self._matched(state[key], names) for key in ("since_log", "before_log"))
        self._since_log = (since_log if main else torch.zeros_like(since_log)).to(self._since_log)

    def _matched(self, values: list[list[float]], names: Sequence[str]) -> Tensor:
        """Return the sums ``values`` of the metrics ``names`` for the metrics of this run, ``[2, N]`` float64."""
        sums = torch.tensor(values, dtype=torch.float64)
        if sums.shape != (2, len(names)):
            raise ValueError(
                f"holds sums of shape {list(sums.shape)}, expected [2, {len(names)}] for {', '.join(names)}; use a "
                "checkpoint of a run with these metrics"
            )
        by_name = dict(zip(names, sums.T, strict=True))
        return torch.stack([by_name.get(name, sums.new_zeros(2)) for name in self._names], dim=1)


def write_scores(path: Path, rows: Dataset, scores: Scores) -> None:
    """Write the scores of ``rows`` as JSON lines, each with its row's origin and the lengths of its responses."""
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
    """Read the scores written by :func:`write_scores`; return None if it was changed or does not have ``rows``."""
    if not is_intact(path) or len(lines := read_lines(path)) != rows:
        return None
    names = [name for name in lines[0] if name not in ("where", TOKENS)]
    return {name: np.array([line[name] for line in lines], dtype=np.float64) for name in names}


# ---- Held-out results before and after training.


def _stages(before: Scores, after: Scores) -> Iterator[tuple[Stage, Scores]]:
    yield "before", before
    yield "after", after


def compare_preferences(before: Scores, after: Scores, *, has_reference: bool = False) -> list[Metric]:
    """Return the mean of every metric before and after training, over the rows it applies to.

    For pairs, also test whether accuracy improved by more than chance. For single responses, add the area under the
    ROC curve: the share of (desirable, undesirable) combinations where the desirable one has the larger reward.

    Args:
        before: scores of the initial model.
        after: scores of the trained model.
        has_reference: whether rewards are relative to the initial model. They are then 0 before training, up to
            rounding, so comparing two of them would be noise: the accuracy before and the test are left out.
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
                interval = mean_interval(values)
            elif pairs:
                interval = proportion_interval(int(values.sum()), len(values))
            else:  # a ranking has several pairs, and only some of them may be correct
                interval = share_interval(values)
            metrics.append(Metric.of(f"eval_{name}", interval, stage))
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
    """Return the mean loss per scored token, in nats, and its exponential, the perplexity."""
    losses = {stage: mean_interval(scores["loss"], scores[WEIGHT]) for stage, scores in _stages(before, after)}
    metrics = [Metric.of("eval_loss", interval, stage) for stage, interval in losses.items()]
    for stage, interval in losses.items():
        value, low, high = (None if x is None else _exp(x) for x in (interval.value, interval.low, interval.high))
        perplexity = Interval(math.nan if value is None else value, low, high, interval.n, interval.method)
        metrics.append(Metric.of("eval_perplexity", perplexity, stage))
    return metrics


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # math.exp(710) raises OverflowError


def compare_rewards(before: Scores, after: Scores) -> list[Metric]:
    """Return means over the rows, accuracy by which response is longer, and how well calibrated confidence is.

    The Brier score (1950) is the mean of ``(1 - p)**2``: 0 at best, 0.25 for a model that always predicts 0.5. The
    expected calibration error is the mean difference between confidence and accuracy over the bins (Guo et al. 2017,
    arXiv 1706.04599, equation 3); its interval comes from resampling rows. Confidence is the probability of the
    response with the higher reward.
    """
    metrics = compare_preferences(before, after)
    for stage, scores in _stages(before, after):
        margins, lengths = scores[MARGINS], scores[LENGTHS]
        correct = margins > 0
        for name, subset in ((f"{ACCURACY}/chosen_longer", lengths > 0), (f"{ACCURACY}/chosen_shorter", lengths < 0)):
            metrics.append(Metric.of(f"eval_{name}", _accuracy(correct, subset), stage))
        metrics += [Metric.of(f"eval_{name}", interval, stage) for name, interval in _calibration(margins, correct)]
    return metrics


def _calibration(margins: np.ndarray, correct: np.ndarray) -> Iterator[tuple[str, Interval]]:
    """Yield the Brier score, the expected calibration error, and the accuracy in each confidence bin."""
    exists = ~np.isnan(margins)
    wrong = 1 / (1 + np.exp(np.clip(margins, -700, 700)))  # predicted probability that the worse response wins
    yield "brier", share_interval(np.nanmean(wrong**2, axis=1))
    confidence = np.nan_to_num(np.maximum(wrong, 1 - wrong))
    bins = np.clip((confidence - 0.5) * 2 * _BINS, 0, _BINS - 1).astype(int)
    in_bin = [exists & (bins == number) for number in range(_BINS)]
    sums = [(where * values).sum(1) for where in in_bin for values in (confidence, correct)]

    def error(sums: np.ndarray) -> np.ndarray:
        """Return errors ``[...]`` from sums ``[..., 2 * bins + 1]``: confidence and correct per bin, and all pairs."""
        return np.abs(sums[..., :-1:2] - sums[..., 1:-1:2]).sum(-1) / sums[..., -1]

    yield "calibration_error", bootstrap_interval(np.stack([*sums, exists.sum(1)], axis=1), error, seed=0)
    for number, where in enumerate(in_bin):
        low = 0.5 + number / (2 * _BINS)
        yield f"calibration/{low:.1f}-{low + 0.5 / _BINS:.1f}", _accuracy(correct, where)


def _accuracy(correct: np.ndarray, subset: np.ndarray) -> Interval:
    """Return the share of ``correct`` pairs in a ``subset``, ``[rows, N]`` each; pairs of a row are not independent."""
    n = int(subset.sum())
    if not n:
        return Interval(np.nan, None, None, 0, "")
    if subset.shape[1] == 1:
        return proportion_interval(int((correct & subset).sum()), n)
    rows = subset.any(1)
    counts = subset[rows].sum(1)
    interval = share_interval((correct & subset)[rows].sum(1) / counts, counts)
    return Interval(interval.value, interval.low, interval.high, n, interval.method)
