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

# Of a tokenized data set; the last one is optional.
_COLUMNS = ("prompt_ids", "response_ids", "scored")


class PlannedBatch(NamedTuple):
    """A micro-batch ready for the model.

    Attributes:
        packed: its ``C`` comparisons.
        rows: ``C`` row numbers in the data set.
        step_weight: of all comparisons of the optimizer step, over its micro-batches and ranks: the loss's denominator.
    """

    packed: PackedBatch
    rows: tuple[int, ...]
    step_weight: float

    def pin_memory(self) -> PlannedBatch:
        """The batch in page-locked memory; ``DataLoader`` calls it."""
        return self._replace(packed=self.packed.pin_memory())


class ComparisonRows(TorchDataset):
    """Tokenized rows, indexed by planned micro-batches instead of single rows; its length is the number of rows."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows.select_columns([name for name in _COLUMNS if name in rows.column_names])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[MicroBatch, float]) -> PlannedBatch:
        micro, step_weight = item
        packed = PackedBatch.build(comparisons_of(self.rows, micro.rows), micro.weights)
        return PlannedBatch(packed, micro.rows, step_weight)


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

    def __iter__(self) -> Iterator[list[tuple[MicroBatch, float]]]:
        order = self.plan.order(self.epoch())
        for number in range(self.plan.steps):
            step = self.plan.step(order, number, self.rank)
            yield [(micro, step.weight) for micro in step.micro_batches]


def collate(batches: Sequence[PlannedBatch]) -> dict[str, Any]:
    """What Trainer hands to ``training_step``: ``{"micro_batches": [PlannedBatch, ...]}``."""
    return {"micro_batches": list(batches)}


def comparisons_of(rows: Dataset, numbers: Sequence[int]) -> list[TokenizedComparison]:
    """Rows ``numbers`` of a tokenized data set, with its masks if it has the column ``scored``."""
    found = rows[list(numbers)]
    masks = found.get("scored", [None] * len(numbers))
    return [
        TokenizedComparison(prompt, responses, scored)
        for prompt, responses, scored in zip(found["prompt_ids"], found["response_ids"], masks, strict=True)
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
