"""From tokenized rows to the micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from simpo.packing.binning import MicroBatch, StepPlan
from simpo.packing.comparison import TokenizedComparison
from simpo.packing.layout import PackedBatch
from simpo.packing.rope import LengthRule
from simpo.training.rankings import OrderedPairs
from simpo.training.running_means import widest_type

# Of a tokenized data set; all but the first two are optional.
REF_LOGPS, MISMATCHED_IDS, MISMATCHED_REF_LOGP = "ref_logps", "mismatched_ids", "mismatched_ref_logp"
LEVELS = "levels"
_COLUMNS = (
    *("prompt_ids", "response_ids", "scored", "scores", "label"),
    *(REF_LOGPS, MISMATCHED_IDS, MISMATCHED_REF_LOGP, LEVELS),
)


class PlannedBatch(NamedTuple):
    """A micro-batch ready for the model.

    The last five are None where the data set has no such thing.

    Attributes:
        packed: its ``C`` comparisons with ``R`` responses.
        rows: ``C`` row numbers in the data set.
        step_weight: of all comparisons of the optimizer step, over its micro-batches and ranks: the loss's denominator.
        pairs: the ordered pairs of the comparisons, of single responses none.
        ref_logps: ``[R]`` float64, log-probabilities under the reference.
        labels: ``[C]`` bool, whether a response that is judged alone is desirable.
        mismatched: each prompt with one response to another prompt, ``C`` in all.
        mismatched_ref_logps: ``[C]`` float64, log-probabilities of these responses under the reference.
        levels: ``[R]`` float64; a response is to win over another by the difference.
    """

    packed: PackedBatch
    rows: tuple[int, ...]
    step_weight: float
    pairs: OrderedPairs
    ref_logps: Tensor | None = None
    labels: Tensor | None = None
    mismatched: PackedBatch | None = None
    mismatched_ref_logps: Tensor | None = None
    levels: Tensor | None = None

    def to(self, device: torch.device | str) -> PlannedBatch:
        """The batch with its tensors on ``device``."""
        widest = widest_type(torch.device(device))

        def moved(tensor: Tensor) -> Tensor:
            dtype = widest if tensor.dtype == torch.float64 else tensor.dtype
            return tensor.to(device, dtype, non_blocking=True)

        return self._each(moved, lambda packed: packed.to(device))

    def pin_memory(self) -> PlannedBatch:
        """The batch in page-locked memory; ``DataLoader`` calls it."""
        return self._each(Tensor.pin_memory, PackedBatch.pin_memory)

    def _each(self, tensor: Callable[[Tensor], Tensor], packed: Callable[[PackedBatch], PackedBatch]) -> PlannedBatch:
        changed: dict[str, Any] = {}
        for name, value in self._asdict().items():
            if isinstance(value, Tensor):
                changed[name] = tensor(value)
            elif isinstance(value, PackedBatch):
                changed[name] = packed(value)
            elif isinstance(value, OrderedPairs):
                changed[name] = OrderedPairs(*map(tensor, value))
        return self._replace(**changed)


class ComparisonRows(TorchDataset):
    """Tokenized rows, indexed by planned micro-batches instead of single rows; its length is the number of rows."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows.select_columns([name for name in _COLUMNS if name in rows.column_names])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[MicroBatch, float]) -> PlannedBatch:
        micro, step_weight = item
        found = self.rows[list(micro.rows)]
        counts = torch.tensor([len(responses) for responses in found["response_ids"]])
        return PlannedBatch(
            PackedBatch.build(_comparisons(found), micro.weights),
            micro.rows,
            step_weight,
            OrderedPairs.of(counts, _flat(_scores(found)) if "scores" in found else None),
            ref_logps=_flat(found.get(REF_LOGPS)),
            labels=None if "label" not in found else torch.tensor(found["label"]),
            mismatched=None if MISMATCHED_IDS not in found else PackedBatch.build(_mismatched(found), micro.weights),
            mismatched_ref_logps=_numbers(found.get(MISMATCHED_REF_LOGP)),
            levels=_flat(found.get(LEVELS)),
        )


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
    return _comparisons(rows[list(numbers)])


def _comparisons(found: Mapping[str, Any]) -> list[TokenizedComparison]:
    masks = found.get("scored", [None] * len(found["prompt_ids"]))
    return [
        TokenizedComparison(prompt, responses, scored)
        for prompt, responses, scored in zip(found["prompt_ids"], found["response_ids"], masks, strict=True)
    ]


def _mismatched(found: Mapping[str, Any]) -> list[TokenizedComparison]:
    pairs = zip(found["prompt_ids"], found[MISMATCHED_IDS], strict=True)
    return [TokenizedComparison(prompt, [response]) for prompt, response in pairs]


def _scores(found: Mapping[str, Any]) -> list[Sequence[float]]:
    """One list a row; that of a pair among rankings says which is the better."""
    return [(1.0, 0.0) if scores is None else scores for scores in found["scores"]]


def _flat(lists: Sequence[Sequence[float]] | None) -> Tensor | None:
    return None if lists is None else _numbers(list(chain.from_iterable(lists)))


def _numbers(values: Sequence[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def token_lengths(rows: Dataset, *, padded: bool, rule: LengthRule | None = None) -> np.ndarray:
    """``[rows]`` most tokens that a comparison takes in a forward, with its prompt shared or as padded rows.

    By ``rule`` responses with different rotary frequencies do not share their prompt.
    """
    table = rows.with_format("arrow")
    prompt = pc.list_value_length(table["prompt_ids"]).to_numpy()
    responses = table["response_ids"]
    count = pc.list_value_length(responses).to_numpy()
    sizes = pc.list_value_length(pc.list_flatten(responses)).to_numpy()
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    if padded:
        lengths = count * (prompt + np.maximum.reduceat(sizes, starts))
    else:
        lengths = prompt + np.add.reduceat(sizes, starts)
        if rule is not None:
            lengths = lengths + rule.repeated_prompts(prompt, sizes, starts)
    if MISMATCHED_IDS not in rows.column_names:
        return lengths
    return np.maximum(lengths, prompt + pc.list_value_length(table[MISMATCHED_IDS]).to_numpy())


def response_counts(rows: Dataset) -> np.ndarray:
    """``[rows]`` how many responses each comparison has, ``K``."""
    return pc.list_value_length(rows.with_format("arrow")["response_ids"]).to_numpy()
