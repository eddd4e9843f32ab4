"""From tokenized rows to the micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from simpo.packing.binning import MicroBatch, StepPlan
from simpo.packing.comparison import TokenizedComparison
from simpo.packing.layout import PackedBatch


class PlannedBatch(NamedTuple):
    """A micro-batch ready for the model.

    Attributes:
        packed: its ``C`` comparisons.
        rows: ``C`` row numbers in the data set.
        comparisons: how many the optimizer step has, over all micro-batches and ranks.
    """

    packed: PackedBatch
    rows: tuple[int, ...]
    comparisons: int

    def pin_memory(self) -> PlannedBatch:
        """The batch in page-locked memory; ``DataLoader`` calls it."""
        return self._replace(packed=self.packed.pin_memory())


class ComparisonRows(TorchDataset):
    """Tokenized rows, indexed by planned micro-batches instead of single rows; its length is the number of rows."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows.select_columns(["prompt_ids", "response_ids"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[MicroBatch, int]) -> PlannedBatch:
        micro, comparisons = item
        packed = PackedBatch.build(comparisons_of(self.rows, micro.rows), micro.weights)
        return PlannedBatch(packed, micro.rows, comparisons)


class PlanSampler(Sampler):
    """Yields, for every step of an epoch, this rank's micro-batches.

    Args:
        plan: the run's plan.
        epoch: called when an epoch starts; tells which one.
        rank: whose share.
    """

    def __init__(self, plan: StepPlan, epoch: Callable[[], int], rank: int) -> None:
        self.plan, self.epoch, self.rank = plan, epoch, rank

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[list[tuple[MicroBatch, int]]]:
        order = self.plan.order(self.epoch())
        for number in range(self.plan.steps):
            step = self.plan.step(order, number, self.rank)
            yield [(micro, step.comparisons) for micro in step.micro_batches]


def collate(batches: Sequence[PlannedBatch]) -> dict[str, Any]:
    """What Trainer hands to ``training_step``: ``{"micro_batches": [PlannedBatch, ...]}``."""
    return {"micro_batches": list(batches)}


def comparisons_of(rows: Dataset, numbers: Sequence[int]) -> list[TokenizedComparison]:
    """Rows ``numbers`` of a tokenized data set."""
    found = rows[list(numbers)]
    return [
        TokenizedComparison(prompt, responses)
        for prompt, responses in zip(found["prompt_ids"], found["response_ids"], strict=True)
    ]


def token_lengths(rows: Dataset, *, padded: bool) -> np.ndarray:
    """``[rows]`` tokens that each comparison takes in a forward, with its prompt shared or as padded rows."""
    table = rows.with_format("arrow")
    prompt = pc.list_value_length(table["prompt_ids"]).to_numpy()
    responses = table["response_ids"]
    count = pc.list_value_length(responses).to_numpy()
    sizes = pc.list_value_length(pc.list_flatten(responses)).to_numpy()
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    if padded:
        return count * (prompt + np.maximum.reduceat(sizes, starts))
    return prompt + np.add.reduceat(sizes, starts)


def response_counts(rows: Dataset) -> np.ndarray:
    """``[rows]`` how many responses each comparison has, ``K``."""
    return pc.list_value_length(rows.with_format("arrow")["response_ids"]).to_numpy()
