"""Turns tokenized rows into the micro-batches of one optimizer step, on the device."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import ProcessorMixin

from simpo.data.images import DIGESTS, IMAGES, ImageReader
from simpo.data.messages import Context
from simpo.data.prompts import Prompt, columns_identity
from simpo.errors import SimpoError
from simpo.models.adapters import freeze_parts_unused_by_text
from simpo.models.checkpoint import Limits
from simpo.packing.attention import causal_lm
from simpo.packing.batching import MicroBatch, RowSizes, StepPlan
from simpo.packing.images import check_image_inputs
from simpo.packing.layout import ImageTensors, PackedBatch, TokenizedComparison
from simpo.packing.model import prepare_policy, state_of
from simpo.packing.rope import LengthRule
from simpo.packing.selfcheck import Path, rows_to_check
from simpo.training.settings import TrainingSettings

CONTENT = "content"  # holds a prompt as JSON; only rows of prompts have this column
# Optional columns that training adds to a tokenized dataset.
REF_LOGPS, MISMATCHED_IDS, MISMATCHED_REF_LOGP = "ref_logps", "mismatched_ids", "mismatched_ref_logp"
LEVELS = "levels"
# Columns of the data that change a row's loss (see simpo.training.preference).
WEIGHT, LABEL_PROBABILITY, MARGIN, BETA = "weight", "label_probability", "margin", "beta"
# Columns of sampled answers: one number per token, and in ROLLOUT the metrics logged for each row.
BEHAVIOR, REF_TOKENS, ADVANTAGES, ROLLOUT = "behavior_logps", "ref_token_logps", "advantages", "rollout"
VALUES, RETURNS = "values", "returns"
# Columns that become PlannedBatch attributes of the same name: lists, and fixed-size values (M numbers in ROLLOUT).
_LISTS = (REF_LOGPS, LEVELS, BEHAVIOR, REF_TOKENS, ADVANTAGES, VALUES, RETURNS)
_NUMBERS = (LABEL_PROBABILITY, MARGIN, BETA, ROLLOUT)
_COLUMNS = (
    "prompt_ids", "response_ids", "scored", "scores", "label",
    IMAGES, DIGESTS, MISMATCHED_IDS, MISMATCHED_REF_LOGP, *_LISTS, *_NUMBERS,
)  # fmt: skip
_ILLUSTRATED = 2  # rows with images to add when checking the fast path
_ROWS_NAMED = 5  # rows an error message lists before it says "and N more"


def widest_float(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over rows, wide enough that splitting them over ranks and micro-batches is harmless."""
    return torch.float32 if device.type == "mps" else torch.float64


class OrderedPairs(NamedTuple):
    """Indices of the ``N`` ordered pairs in ``C`` comparisons with ``R`` responses in total."""

    better: Tensor  # `[N]` the preferred response of each pair
    worse: Tensor  # `[N]` the other one
    comparison: Tensor  # `[N]` which comparison the pair belongs to
    share: Tensor  # `[N]` one over the number of pairs in that comparison, float64
    best: Tensor  # `[C]` the best response of each comparison

    @classmethod
    def of(cls, counts: Tensor, scores: Tensor | None = None) -> OrderedPairs:
        """Return all pairs whose first response has the higher score; ties form no pair.

        Args:
            counts: number of responses ``K`` in each comparison, ``[C]``; they may differ.
            scores: ``[R]``, highest first in each comparison; None if the responses are in order, best first.
        """
        first = counts.cumsum(0) - counts
        owner = torch.repeat_interleave(counts)  # [R]
        scores = -torch.arange(len(owner)) if scores is None else scores
        rivals = counts[owner]  # [R] responses in the same comparison, itself included
        better = torch.repeat_interleave(rivals)  # every response against each of its rivals
        worse = torch.arange(len(better)) - (rivals.cumsum(0) - rivals - first[owner])[better]
        ordered = scores[better] > scores[worse]
        better, worse = better[ordered], worse[ordered]
        comparison = owner[better]
        share = 1 / torch.bincount(comparison, minlength=len(counts))[comparison].double()
        return cls(better, worse, comparison, share, first)

    def weighted(self, weights: Tensor) -> OrderedPairs:
        """Return the pairs with weights ``[N]``, by which :meth:`mean` multiplies their values."""
        return self._replace(share=self.share * weights)

    def mean(self, values: Tensor) -> Tensor:
        """Average ``values`` ``[N, ...]`` over the pairs of each comparison, giving ``[C, ...]``."""
        shared = values * self.share.to(values).view(-1, *[1] * (values.dim() - 1))
        return values.new_zeros(len(self.best), *values.shape[1:]).index_add(0, self.comparison, shared)


class PlannedBatch(NamedTuple):
    """A micro-batch ready for the model; each field after ``pairs`` is None if the dataset lacks its column."""

    packed: PackedBatch  # `C` comparisons with `R` responses and `S` scored tokens
    rows: tuple[int, ...]  # `C` row numbers in the dataset
    # The denominator of the loss: the total weight of the optimizer step, over all micro-batches and ranks.
    step_weight: float
    pairs: OrderedPairs  # the ordered pairs of the comparisons; single responses have none
    # `[R]` float64, scores of the responses; an unscored pair among rankings has 0 and minus infinity.
    scores: Tensor | None = None
    ref_logps: Tensor | None = None  # `[R]` float64, log-probabilities under the reference
    labels: Tensor | None = None  # `[C]` bool, whether a single response is desirable
    mismatched: PackedBatch | None = None  # `C` comparisons: each prompt with a response to another prompt
    mismatched_ref_logps: Tensor | None = None  # `[C]` float64, their log-probabilities under the reference
    levels: Tensor | None = None  # `[R]` float64; the difference of two levels is the margin one response should win by
    behavior_logps: Tensor | None = None  # `[S]` float64, token log-probabilities under the policy that sampled them
    ref_token_logps: Tensor | None = None  # `[S]` float64, token log-probabilities under the reference
    advantages: Tensor | None = None  # `[S]` float64, token advantages
    rollout: Tensor | None = None  # `[C, M]` float64, metrics of the sampled answers
    # `[S]` float64, the value function's estimates at sampling time, for the state in which each token was chosen.
    values: Tensor | None = None
    returns: Tensor | None = None  # `[S]` float64, targets of the value function; NaN where there is none
    label_probability: Tensor | None = None  # `[C]` float64, probability that the chosen response is the better one
    margin: Tensor | None = None  # `[C]` float64, margin by which the chosen response should win
    beta: Tensor | None = None  # `[C]` float64, the objective's hyperparameter

    def to(self, device: torch.device | str) -> PlannedBatch:
        """Move the batch's tensors to ``device``."""
        widest = widest_float(torch.device(device))

        def move(tensor: Tensor) -> Tensor:
            dtype = widest if tensor.dtype == torch.float64 else tensor.dtype
            return tensor.to(device, dtype, non_blocking=True)

        return self._map(move, lambda packed: packed.to(device))

    def pin_memory(self) -> PlannedBatch:
        """Copy the batch to page-locked memory; called by ``DataLoader``."""
        return self._map(Tensor.pin_memory, PackedBatch.pin_memory)

    def _map(self, tensor: Callable[[Tensor], Tensor], packed: Callable[[PackedBatch], PackedBatch]) -> PlannedBatch:
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
    """Tokenized rows, indexed by planned micro-batch rather than by row; its length is the number of rows."""

    def __init__(self, rows: Dataset, reader: ImageReader | None = None) -> None:
        self._reader = reader
        self.rows = rows.select_columns([name for name in _COLUMNS if name in rows.column_names])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[MicroBatch, float]) -> PlannedBatch:
        micro, step_weight = item
        columns = self.rows[list(micro.rows)]
        comparisons = _comparisons(columns, self._reader)
        counts = torch.tensor([len(responses) for responses in columns["response_ids"]])
        scores, mismatched = columns.get("scores"), None
        if scores is not None:  # a pair among rankings has no scores; its first response is the better one
            scores = _flat([(0.0, -math.inf) if given is None else given for given in scores])
        if MISMATCHED_IDS in columns:
            prompts = zip(comparisons, columns[MISMATCHED_IDS], strict=True)
            others = [TokenizedComparison(prompt.prompt_ids, [ids], images=prompt.images) for prompt, ids in prompts]
            mismatched = PackedBatch.build(others, micro.weights)
        return PlannedBatch(
            PackedBatch.build(comparisons, micro.weights),
            micro.rows,
            step_weight,
            OrderedPairs.of(counts, scores),
            scores=scores,
            labels=None if "label" not in columns else torch.tensor(columns["label"]),
            mismatched=mismatched,
            mismatched_ref_logps=_doubles(columns.get(MISMATCHED_REF_LOGP)),
            **{name: _flat(columns[name]) for name in _LISTS if name in columns},
            **{name: _doubles(columns[name]) for name in _NUMBERS if name in columns},
        )

    def unplanned_batch(self, rows: Sequence[int]) -> PlannedBatch:
        """Return a micro-batch of ``rows`` outside any optimizer step, each with weight 1."""
        return self[MicroBatch(tuple(rows), (1.0,) * len(rows)), 1.0]


def _doubles(values: Sequence[Any] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def _flat(lists: Sequence[Sequence[float]] | None) -> Tensor | None:
    return None if lists is None else _doubles(list(chain.from_iterable(lists)))


def comparisons_of(
    rows: Dataset, numbers: Sequence[int], reader: ImageReader | None = None
) -> list[TokenizedComparison]:
    """Return rows ``numbers`` of a tokenized dataset, with their images and any masks in its ``scored`` column."""
    return _comparisons(rows[list(numbers)], reader)


def comparisons_to_check(
    model: nn.Module, datasets: Sequence[Dataset], reader: ImageReader | None = None
) -> list[TokenizedComparison]:
    """Return the rows the self-check chooses from: the first and the longest rows of the first dataset.

    Also adds a few rows with images from the first dataset that has any, even if it is only used for evaluation.
    """
    rows = datasets[0]
    numbers = rows_to_check(model, row_sizes(rows, "packed").lengths.tolist())
    comparisons = comparisons_of(rows, numbers, reader)
    for dataset in datasets:
        if len(illustrated := rows_with_images(dataset)[:_ILLUSTRATED].tolist()):
            more = [number for number in illustrated if dataset is not rows or number not in numbers]
            return comparisons + (comparisons_of(dataset, more, reader) if more else [])
    return comparisons


def _comparisons(columns: Mapping[str, Any], reader: ImageReader | None) -> list[TokenizedComparison]:
    masks = columns.get("scored", [None] * len(columns["prompt_ids"]))
    images = image_tensors(columns, reader)
    return list(map(TokenizedComparison, columns["prompt_ids"], columns["response_ids"], masks, images))


class PlanSampler(Sampler):
    """Yields this rank's micro-batches for every step of an epoch; ``epoch()`` returns the epoch about to start."""

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
    """Return the argument Trainer passes to ``training_step``: ``{"micro_batches": [PlannedBatch, ...]}``."""
    return {"micro_batches": list(batches)}


def step_loader(
    rows: Dataset,
    plan: StepPlan,
    epoch: Callable[[], int],
    args: TrainingSettings,
    reader: ImageReader | None = None,
) -> DataLoader:
    """Return a loader of this rank's micro-batches for every step; ``epoch()`` returns the epoch about to start.

    accelerate must not prepare it: the plan has already distributed the rows, and none may be repeated.
    """
    return DataLoader(
        ComparisonRows(rows, reader),  # type: ignore[arg-type]
        batch_sampler=PlanSampler(plan, epoch, args.process_index),
        collate_fn=collate,
        # a separate generator, so that an evaluation between two steps does not change dropout's random numbers
        generator=torch.Generator(),
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
    )


# ---- Contents of tokenized rows.


def prompts_from_rows(rows: Dataset) -> list[Prompt]:
    """Return the prompts in rows built by :meth:`~simpo.training.online.OnlineTrainer.prepare`."""
    records = [json.loads(text) for text in rows[CONTENT][:]]
    return [Prompt(**fields | {"context": Context(**fields["context"])}) for fields in records]


def rows_digest(rows: Dataset) -> str:
    """Return the SHA-256 of the rows in order: token ids, masks, images, scores, labels and numeric columns.

    For prompts whose answers are sampled, it also covers the other columns, because an annotator may read them.
    """
    columns = [name for name in ("prompt_ids", "response_ids", "scored") if name in rows.column_names]
    digest = hashlib.sha256()
    for name in ("scores", "label", DIGESTS, LEVELS, WEIGHT, LABEL_PROBABILITY, MARGIN, BETA):
        if name in rows.column_names:
            digest.update(json.dumps([name, rows[name][:]]).encode())
    if CONTENT in rows.column_names:
        digest.update("".join(columns_identity(prompts_from_rows(rows)).values()).encode())
    for batch in rows.select_columns(columns).with_format("arrow").iter(1000):
        for name in columns:
            column = batch[name]
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):  # lengths, at every depth
                digest.update(pc.list_value_length(column).cast(pa.int64()).to_numpy().tobytes())
                column = pc.list_flatten(column)
            digest.update(column.cast(pa.int64()).to_numpy().tobytes())
    return digest.hexdigest()


# ---- Lengths of tokenized rows, and rows a model cannot read.


def response_counts(rows: Dataset) -> np.ndarray:
    """Return the number of responses ``K`` in each comparison, ``[rows]``."""
    return pc.list_value_length(rows.with_format("arrow")["response_ids"]).to_numpy()


def response_tokens(rows: Dataset) -> np.ndarray:
    """Return the number of response tokens in each comparison, ``[rows]``."""
    _, responses, first = _sizes(rows)
    return np.add.reduceat(responses, first)


def scored_tokens(rows: Dataset) -> np.ndarray:
    """Return the number of scored tokens per row, ``[rows]``: those marked by the ``scored`` column, or all."""
    tokens = response_tokens(rows)
    if "scored" not in rows.column_names:
        return tokens
    marks = pc.list_flatten(pc.list_flatten(rows.with_format("arrow")["scored"])).to_numpy(zero_copy_only=False)
    return np.add.reduceat(marks.astype(np.int64), np.cumsum(tokens) - tokens)


def _sizes(rows: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return prompt lengths ``[rows]``, response lengths ``[R]``, and the index of each row's first response."""
    table = rows.with_format("arrow")
    prompts, answers = pc.list_value_length(table["prompt_ids"]).to_numpy(), table["response_ids"]
    responses = pc.list_value_length(pc.list_flatten(answers)).to_numpy()
    counts = pc.list_value_length(answers).to_numpy()
    return prompts, responses, np.cumsum(counts) - counts


def _mismatched_sizes(rows: Dataset) -> np.ndarray | int:
    if MISMATCHED_IDS not in rows.column_names:
        return 0
    return pc.list_value_length(rows.with_format("arrow")[MISMATCHED_IDS]).to_numpy()


def row_sizes(rows: Dataset, path: Path, rule: LengthRule | None = None) -> RowSizes:
    """Return how many tokens each row takes in a forward pass on ``path``.

    Under ``rule``, responses with different rotary frequencies cannot share their prompt.
    """
    prompts, responses, first = _sizes(rows)
    packed = prompts + np.add.reduceat(responses, first)
    if rule is not None:
        packed = packed + rule.repeated_prompts(prompts, responses, first)
    mismatched = _mismatched_sizes(rows)
    longest = np.maximum(np.maximum.reduceat(responses, first), mismatched)
    packed = np.maximum(packed, prompts + mismatched)
    return RowSizes.of(path, prompts, response_counts(rows), longest, packed)


def check_rows(limits: Limits, rows: Dataset, label: str) -> None:
    """Raise :class:`SimpoError` if a row, with its longest response, exceeds what the model can read."""
    if limits.positions is not None:
        prompts, responses, first = _sizes(rows)
        lengths = prompts + np.maximum(np.maximum.reduceat(responses, first), _mismatched_sizes(rows))
        if len(too_long := np.flatnonzero(lengths > limits.positions)):
            raise SimpoError(
                f"{label}: {describe_rows(rows, too_long.tolist())}: {limits.fault(int(lengths[too_long[0]]))}; "
                f"set max_length to {limits.positions} or less"
            )
    table = rows.with_format("arrow")
    unknown = any(_has_unknown_id(table[name], limits.embeddings) for name in ("prompt_ids", "response_ids"))
    for number, row in enumerate(rows.select_columns(["prompt_ids", "response_ids"]) if unknown else ()):
        if fault := limits.fault(0, chain(row["prompt_ids"], *row["response_ids"])):
            raise SimpoError(
                f"{label}: {describe_rows(rows, [number])}: {fault}; use the model's own tokenizer, or resize the "
                "model's embeddings to this one"
            )


def _has_unknown_id(column: Any, embeddings: int | None) -> bool:
    while hasattr(column.type, "value_type"):
        column = pc.list_flatten(column)
    if embeddings is None or not len(column):
        return False
    bounds = pc.min_max(column).as_py()
    return bounds["min"] < 0 or bounds["max"] >= embeddings


def describe_rows(dataset: Dataset, rows: Sequence[int]) -> str:
    """Describe where ``rows`` come from, listing the first few by file and line."""
    has_origin = "where" in dataset.column_names
    named = [dataset[row]["where"] if has_origin else f"row {row}" for row in rows[:_ROWS_NAMED]]
    more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
    return ", ".join(named) + more


# ---- Images of tokenized rows.


def rows_with_images(rows: Dataset) -> np.ndarray:
    """Return the row numbers of the tokenized rows that have images."""
    if IMAGES not in rows.column_names:
        return np.array([], dtype=int)
    lengths = pc.list_value_length(rows.with_format("arrow")[IMAGES])
    return np.flatnonzero(pc.fill_null(lengths, 0).to_numpy())


def image_reader(
    model: nn.Module, processing_class: Any, datasets: Sequence[Dataset | None], args: Any
) -> ImageReader | None:
    """Return a reader for the images in the rows; without images, freeze the model's image parts and return None.

    Rows with images require ``processing_class`` to be the model's processor.
    """
    given = [rows for rows in datasets if rows is not None]
    illustrated = [(rows, numbers[0]) for rows in given if len(numbers := rows_with_images(rows))]
    if not illustrated:
        freeze_parts_unused_by_text(model)
        return None
    if not isinstance(processing_class, ProcessorMixin):
        raise SimpoError(
            "images: training on images needs the model's processor as processing_class; pass it, or remove the images "
            "(from the command line, simpo train, sft and reward support images)"
        )
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    if args.world_size > 1 and (launched or args.fsdp or args.deepspeed or args.gradient_checkpointing):
        raise SimpoError(
            "images: training on several processes requires DDP without activation checkpointing, because some "
            "micro-batches have no images"
        )
    inner, reader = prepare_policy(model), ImageReader(processing_class)
    if state_of(inner).lengths is not None:
        raise SimpoError(
            f"images: not supported for {type(inner).__name__}, whose rotary frequencies depend on a row's length"
        )
    rows, number = illustrated[0]
    row = rows[int(number)]
    (image, *_) = reader.tensors(row[IMAGES], row[DIGESTS])
    check_image_inputs(causal_lm(inner), image, reader.example(row[IMAGES][0]))
    return reader


def image_tensors(columns: Mapping[str, Any], reader: ImageReader | None) -> list[tuple[ImageTensors, ...]]:
    """Return the images of each row in a batch.

    Raise :class:`SimpoError` if a row has images and ``reader`` is None: the trainer was created without images.
    """
    count = len(columns["prompt_ids"])
    cells = zip(columns.get(IMAGES) or [[]] * count, columns.get(DIGESTS) or [[]] * count, strict=True)
    tensors: list[tuple[ImageTensors, ...]] = []
    for references, digests in cells:
        if references and reader is None:
            raise SimpoError(
                "images: the trainer was created with rows that have no images; include rows with images from the start"
            )
        tensors.append(reader.tensors(references, digests) if references and reader is not None else ())
    return tensors
