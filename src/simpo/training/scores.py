"""Figures of rows and responses of a data set: gathered from micro-batches in any order, told in the data set's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from simpo.packing.binning import StepPlan
from simpo.packing.layout import PackedBatch
from simpo.training.batches import PlannedBatch, PlanSampler, comparisons_of, response_counts
from simpo.training.running_means import RunningMeans, widest_type

# Figures of every row of a data set, in its order: the names of the metrics and WEIGHT, ``[rows]`` each.
Scores = dict[str, np.ndarray]
WEIGHT = "weight"


class RowFigures:
    """Rows' figures with their weights, of as many places as every rank has, so that ranks can gather them.

    Args:
        capacity: places; those that stay empty have row number -1.
        names: how many figures a row has, ``N``.
        device: where they are kept.

    Attributes:
        figures: ``[capacity, N + 1]``, the weight last.
        rows: ``[capacity]`` numbers in the data set.
    """

    def __init__(self, capacity: int, names: int, device: torch.device) -> None:
        self.figures = torch.zeros(capacity, names + 1, device=device, dtype=widest_type(device))
        self.rows = torch.full((capacity,), -1, device=device)
        self._filled = 0

    def add(self, batch: PlannedBatch, found: Tensor) -> None:
        """Keep ``found``, ``[C, N]``, of ``batch``, unless that only fills up a rank's share."""
        weights = batch.packed.weights
        if not weights.any():
            return
        here = slice(self._filled, self._filled + len(batch.rows))
        self.figures[here, :-1], self.figures[here, -1] = found.to(self.figures), weights.to(self.figures)
        self.rows[here] = torch.tensor(batch.rows, device=self.rows.device)
        self._filled += len(batch.rows)


def scores_of(figures: np.ndarray, rows: np.ndarray, names: Sequence[str]) -> Scores:
    """What all ranks' :class:`RowFigures` hold, put together along the first dimension, in the order of the rows."""
    real = rows >= 0
    ordered = figures[real][np.argsort(rows[real])].astype(np.float64)
    return {name: ordered[:, column] for column, name in enumerate((*names, WEIGHT))}


def mean_figures(figures: np.ndarray, rows: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Weighted means of the same, by name."""
    real = torch.from_numpy(figures[rows >= 0].astype(np.float64))
    means = RunningMeans(names, real.device)
    means.add(real[:, :-1], real[:, -1])
    return means.take(lambda sums: sums)


def response_figures(
    rows: Dataset, plan: StepPlan, rank: int, compute: Callable[[PackedBatch], Tensor], device: torch.device
) -> Tensor:
    """``[R]`` float64 figures of the responses of ``rows`` that are this rank's by ``plan``, 0 for the others.

    Args:
        rows: tokenized.
        plan: of these rows.
        rank: whose share.
        compute: ``[r]`` figures of a batch with ``r`` responses.
        device: where batches are computed.
    """
    counts = response_counts(rows)
    ends = np.cumsum(counts)
    figures = torch.zeros(int(ends[-1]), dtype=widest_type(device), device=device)
    for step in PlanSampler(plan, lambda: 0, rank):
        for micro, _ in step:
            found = compute(PackedBatch.build(comparisons_of(rows, micro.rows)).to(device))
            if any(micro.weights):  # not a filler
                index = np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in micro.rows])
                figures[torch.from_numpy(index).to(device)] = found.to(figures)
    return figures
