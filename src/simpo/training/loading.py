"""How the rows of a data set become the elements of a loader, one an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from simpo.packing.binning import StepPlan
from simpo.packing.rope import LengthRule
from simpo.training.batches import ComparisonRows, PlanSampler, collate, response_counts, token_lengths
from simpo.training.settings import TrainingSettings

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
