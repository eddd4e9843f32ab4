"""From tokenized rows to the micro-batches of a step, and from their metrics to means over steps and data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from simpo.packing.batching import MicroBatch, StepPlan
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.rope import LengthRule
from simpo.training.settings import TrainingSettings

# ---- The ordered pairs of comparisons with K responses: every response with every one that is worse.


class OrderedPairs(NamedTuple):
    """Indices of the ``N`` ordered pairs of ``C`` comparisons with ``R`` responses in all.

    Attributes:
        better: ``[N]`` the preferred response of each pair.
        worse: ``[N]`` the other one.
        comparison: ``[N]`` which comparison a pair belongs to.
        share: ``[N]`` one over the number of pairs of that comparison, float64.
        best: ``[C]`` the best response of each comparison.
    """

    better: Tensor
    worse: Tensor
    comparison: Tensor
    share: Tensor
    best: Tensor

    @classmethod
    def of(cls, counts: Tensor, scores: Tensor | None = None) -> OrderedPairs:
        """All pairs whose first response has the higher score; equal scores make none.

        Args:
            counts: ``[C]`` responses of each comparison, ``K``; they may differ.
            scores: ``[R]``, the highest of each comparison first; None: the responses are in order, the best first.
        """
        first = counts.cumsum(0) - counts
        owner = torch.repeat_interleave(counts)  # [R]
        scores = -torch.arange(len(owner)) if scores is None else scores
        rivals = counts[owner]  # [R] of its own comparison, itself included
        better = torch.repeat_interleave(rivals)  # every response with each of them
        worse = torch.arange(len(better)) - (rivals.cumsum(0) - rivals - first[owner])[better]
        ordered = scores[better] > scores[worse]
        better, worse = better[ordered], worse[ordered]
        comparison = owner[better]
        share = 1 / torch.bincount(comparison, minlength=len(counts))[comparison].double()
        return cls(better, worse, comparison, share, first)

    def mean(self, values: Tensor) -> Tensor:
        """``[C, ...]`` means over the pairs of each comparison, of ``values`` ``[N, ...]``."""
        shared = values * self.share.to(values).view(-1, *[1] * (values.dim() - 1))
        return values.new_zeros(len(self.best), *values.shape[1:]).index_add(0, self.comparison, shared)


# ---- Weighted means of the figures of training: since the last log, and since the start.


def widest_type(device: torch.device) -> torch.dtype:
    """In which figures are kept, so that what ranks and micro-batches they came by cannot be seen in them."""
    return torch.float32 if device.type == "mps" else torch.float64


class RunningMeans:
    """Sums over rows on one rank; nothing waits for the device until a mean is asked for.

    A figure that is NaN says nothing about its row, and its mean is over the other rows; the loss always counts.

    Args:
        names: of the figures, ``N``, the loss first.
        device: where the sums are kept.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        # [2, N] sums of figures and of the weights that they count with
        self._since_log = torch.zeros(2, len(names), device=device, dtype=widest_type(device))
        self._before_log = torch.zeros(2, len(names), dtype=torch.float64)  # of all ranks: what earlier logs took

    def add(self, figures: Tensor, weights: Tensor) -> None:
        """Count rows' ``figures``, ``[C, N]``, with ``weights``, ``[C]``."""
        sums = self._since_log
        figures, weights = figures.to(sums), weights.to(sums, non_blocking=True)
        says_nothing = figures.isnan()
        says_nothing[:, 0] = False
        sums += torch.stack([weights @ figures.masked_fill(says_nothing, 0), weights @ (~says_nothing).to(sums)])

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call, over all ranks, by name, of what there is. ``reduce`` sums over ranks."""
        taken = reduce(self._since_log.clone()).cpu().double()
        self._since_log.zero_()
        self._before_log += taken
        return self._means(taken)

    def overall(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the start, over all ranks and, after a resume, over the whole run."""
        return self._means(self._before_log + reduce(self._since_log.clone()).cpu().double())

    def _means(self, sums: Tensor) -> dict[str, float]:
        columns = zip(self._names, *sums.tolist(), strict=True)
        return {name: total / weight for name, total, weight in columns if weight}

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON; the same on every rank."""
        return {"since_log": reduce(self._since_log.clone()).tolist(), "before_log": self._before_log.tolist()}

    def restore(self, state: dict[str, Any], *, main: bool) -> None:
        """Continue from ``state``; the main rank takes the sums of all."""
        since_log = self._since_log.new_tensor(state["since_log"])
        self._since_log = since_log if main else torch.zeros_like(since_log)
        self._before_log = torch.tensor(state["before_log"], dtype=torch.float64)


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


# ---- How the rows of a data set become the elements of a loader, one an optimizer step.


# Tokens of a micro-batch where ``max_batch_tokens`` is not set; docs/performance.md says why.
_ACCELERATOR_TOKENS, _CPU_TOKENS = 16384, 2048


def plan_steps(
    rows: Dataset,
    args: TrainingSettings,
    rows_per_device: int,
    *,
    padded: bool,
    shuffled: bool,
    drop_last: bool,
    weights: np.ndarray | None,
    rule: LengthRule | None,
) -> StepPlan:
    """The plan that all ranks share.

    Args:
        rows: tokenized.
        args: of the run.
        rows_per_device: so many rows a step and rank.
        padded: the forward takes padded rows, not shared prompts.
        shuffled: by the seed of ``args``, else in the order of ``rows``.
        drop_last: leave out a last step that is not full.
        weights: ``[rows]`` how much each counts in its step's mean; None for all alike.
        rule: of a model whose rotary frequencies depend on a row's length.
    """
    lengths = token_lengths(rows, padded=padded, rule=rule)
    budget = args.max_batch_tokens
    if budget is None:
        budget = max(_ACCELERATOR_TOKENS if args.device.type != "cpu" else _CPU_TOKENS, int(lengths.max()))
    seed = args.seed if args.data_seed is None else args.data_seed
    return StepPlan(
        lengths=lengths,
        rows_per_step=rows_per_device * args.world_size,
        max_batch_tokens=budget,
        world_size=args.world_size,
        seed=seed if shuffled else None,
        drop_last=drop_last,
        padded_rows=response_counts(rows) if padded else None,
        weights=weights,
    )


def step_loader(rows: Dataset, plan: StepPlan, epoch: Callable[[], int], args: TrainingSettings) -> DataLoader:
    """This rank's micro-batches of every step; ``epoch`` tells which one starts.

    Not to be prepared by accelerate: the plan has already shared the rows out, and none may be repeated.
    """
    return DataLoader(
        ComparisonRows(rows),  # type: ignore[arg-type]
        batch_sampler=PlanSampler(plan, epoch, args.process_index),
        collate_fn=collate,
        # its own, so that an evaluation between two steps does not change what dropout draws
        generator=torch.Generator(),
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
    )


# ---- Figures of rows and responses of a data set: gathered from micro-batches in any order, told in the data
# set's.


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
