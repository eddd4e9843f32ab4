"""Estimates whether a recipe fits a machine and how long it takes, and finds the fastest settings that fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from typing import Any, Literal

import numpy as np
import psutil
import torch
from datasets import Dataset

from simpo.errors import SimpoError, one_line, third_party
from simpo.models.loading import load_tokenizer
from simpo.packing.batching import StepPlan, default_batch_tokens
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.selfcheck import Path
from simpo.planning.cards import (
    COMMUNICATION,
    CONTEXT,
    FRAGMENTATION,
    find_card,
    local_card,
    machine_name,
    stored_rates,
)
from simpo.planning.memory import ResidentMemory, Step, check_forward, measure_resident_memory, measure_step
from simpo.planning.model import Blueprint
from simpo.planning.settings import PlanSettings
from simpo.training.batches import comparisons_of, row_sizes
from simpo.training.online import OnlineTrainer
from simpo.training.packed import PackedTrainer
from simpo.training.preference import PreferenceTrainer
from simpo.training.reward import RewardTrainer
from simpo.training.settings import load_datasets
from simpo.training.sft import SFTTrainer

logger = logging.getLogger(__name__)

KINDS: dict[str, type[PackedTrainer]] = {
    kind.command: kind for kind in (PreferenceTrainer, SFTTrainer, RewardTrainer, OnlineTrainer)
}
Sharding = Literal["none", "ddp", "fsdp", "zero2", "zero3"]

_SHARDED = ("fsdp", "zero3")  # these shard the weights too

_SAMPLE = 2000  # rows to tokenize from a large dataset
_STEPS = 16  # how many of the run's steps are planned
_BUDGETS = (2048, 4096, 8192, 16384, 32768)  # candidates for max_batch_tokens
_SHARES = (0.0, 0.5, 1.0)  # candidates for the fraction of checkpointed layers
_MEASURED = 3  # how many of the best candidates are measured individually
_BUCKETS = 2 * 2 * 5e8  # bytes of DeepSpeed's buckets: two of 500 million half-precision numbers


@dataclass(frozen=True)
class Choice:
    """Settings that affect speed and memory, but not the result of training."""

    max_batch_tokens: int  # largest number of tokens in one forward
    checkpointed_share: float  # fraction of the layers that recompute their activations; 0 without checkpointing
    sharding: Sharding  # how processes share weights, gradients and optimizer states

    @property
    def keys(self) -> dict[str, Any]:
        """The recipe keys; sharding is up to the launcher."""
        keys: dict[str, Any] = {"max_batch_tokens": self.max_batch_tokens}
        keys["activation_checkpointing"] = self.checkpointed_share > 0
        if 0 < self.checkpointed_share < 1:
            keys["checkpointed_share"] = self.checkpointed_share
        return keys


@dataclass(frozen=True)
class Batches:
    """Statistics of the micro-batches in the first steps."""

    heaviest: tuple[int, ...]  # rows of the micro-batch with the most tokens
    tokens: int  # tokens in that micro-batch
    per_step: float  # average number of micro-batches per process and step
    tokens_per_step: float  # average number of tokens per process and step


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run with a given choice."""

    choice: Choice
    memory: dict[str, float]  # peak bytes of one process, by purpose
    parameters: int  # number of parameters in the model
    tokens: float  # tokens per step, over all processes
    flops: float  # FLOPs per step, over all processes, counted as `torch.utils.flop_counter` does
    step_seconds: float | None  # seconds per optimizer step; None if the machine's rates are unknown
    peak_phase: str  # the phase in which memory peaks

    @property
    def total(self) -> float:
        """Peak bytes of one process."""
        return sum(self.memory.values())


def _with_working_path(blueprint: Blueprint) -> tuple[Blueprint, Path]:
    """Return the blueprint and the path of its batches: padded ones if the model's forward rejects the fast path."""
    tiny = PackedBatch.build([TokenizedComparison([0] * 4, [[0] * 3, [0] * 3])])
    if blueprint.batch_path() != "padded":
        try:
            check_forward(blueprint, tiny)
        except Exception as error:  # as in the self-check, whatever the forward of an unknown model raises
            logger.warning("the plan pads batches, because the fast path fails on this model: %s", one_line(error))
        else:
            return blueprint, blueprint.batch_path()
    padded = replace(blueprint, path="padded")
    with third_party("model_name_or_path: simpo plan cannot trace this model"):
        check_forward(padded, tiny)
    return padded, "padded"


class Planner:
    """Makes estimates for one recipe on one machine.

    Args:
        parts: the recipe's settings for the model, the data and the training.
        settings: the machine, and the shape of the rows if the data is not read.
        rows: all rows of the run, tokenized; by default read from the data or built from ``settings``.

    Attributes:
        card: the card that each process runs on; None for a CPU.
        rates: how fast it computes; None if unknown.
        recipe_choice: the choice made by the recipe.
    """

    def __init__(self, parts: Sequence[Any], settings: PlanSettings, rows: Dataset | None = None) -> None:
        model, _, config = parts
        self.gpus, self.price = settings.gpus, settings.price
        given = (settings.gpu, settings.gpu_memory_gb, settings.gpu_tflops, settings.gpu_terabytes)
        local = all(value is None for value in given)
        self.card = local_card() if local else find_card(*given)
        autocast = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
        stored = stored_rates().get(machine_name(half=autocast is not None)) if local else None
        self.rates = stored or (None if self.card is None else self.card.rates)
        rows, total = (rows, len(rows)) if rows is not None else _rows_of(parts, settings)
        self._rows_per_step = config.per_device_train_batch_size * self.gpus
        needed = self._rows_per_step * _STEPS if not total else min(total, self._rows_per_step * _STEPS)
        # A sample may have fewer rows than the first steps need.
        self._rows = rows if len(rows) >= needed else rows.select(np.arange(needed) % len(rows))
        self._seed = config.seed if config.data_seed is None else config.data_seed
        # 0 if the number of rows is unknown
        self.steps = max(config.max_steps, 0) or math.ceil(
            math.ceil(total / self._rows_per_step) * config.num_train_epochs
        )
        objective = getattr(config, "row", None)
        self._blueprint = Blueprint.read(
            model,
            reward=settings.command == "reward",
            path=config.forward_path,
            optimizer=getattr(config.optim, "value", config.optim),
            cuda=self.card is not None,
            autocast=autocast,
            reference=bool(objective and objective.needs_reference and not config.precompute_ref_log_probs),
            divergence=bool(getattr(config, "kl_weight", 0.0)),
            pair_weights=getattr(config, "wpo_weights", False),
        )
        self._blueprint, path = _with_working_path(self._blueprint)
        self._sizes = row_sizes(self._rows, path)
        self.longest = int(self._sizes.lengths.max())
        checkpointing = getattr(config, "activation_checkpointing", False) or config.gradient_checkpointing
        self.recipe_choice = Choice(
            config.max_batch_tokens or default_batch_tokens(self.longest, cpu=self.card is None),
            config.checkpointed_share if checkpointing else 0.0,
            "none" if self.gpus == 1 else settings.sharding or "fsdp",
        )

    # ---- One choice.

    def estimate(self, choice: Choice, like: Choice | None = None) -> Estimate:
        """Estimate the memory and time of the run with ``choice``.

        With ``like``, that choice's micro-batch is measured instead, and activations and FLOPs are scaled by tokens.
        """
        like = like or choice
        batches, measured = self._batches(choice.max_batch_tokens), self._batches(like.max_batch_tokens)
        step, resident, memory = self._step(like), self._resident(choice.sharding), self._states(choice.sharding)
        peak = step.peaks[step.peak_phase] - (0.0 if measured.per_step > 1 else memory["gradients"])
        activations = peak * batches.tokens / measured.tokens
        update = resident.update * self._shares(choice.sharding)[1]
        memory["activations"] = max(activations, update)
        if self.card is not None:
            memory["context"] = CONTEXT + (COMMUNICATION if self.gpus > 1 else 0.0)
            memory["fragmentation"] = FRAGMENTATION * sum(memory.values())
        return Estimate(
            choice,
            memory,
            parameters=resident.parameters,
            tokens=batches.tokens_per_step * self.gpus,
            flops=step.cost.flops * batches.tokens_per_step / measured.tokens * self.gpus,
            step_seconds=self._seconds(step, resident, choice.sharding, batches, measured.tokens),
            peak_phase="the optimizer step" if update > activations else step.peak_phase,
        )

    @cache  # noqa: B019 - there are few planners, and they live as long as the command
    def _batches(self, max_batch_tokens: int) -> Batches:
        plan = StepPlan(self._sizes, self._rows_per_step, max_batch_tokens, self.gpus, self._seed)
        order, steps = plan.order(0), min(plan.steps, _STEPS)
        shares = [share for number in range(steps) for share in plan.steps_of_all_ranks(order, number)]
        batches = [micro.rows for share in shares for micro in share.micro_batches]
        tokens = [self._sizes.batch_tokens(rows) for rows in batches]
        return Batches(
            batches[int(np.argmax(tokens))],
            tokens=max(tokens),
            per_step=len(batches) / len(shares),
            tokens_per_step=sum(tokens) / len(shares),
        )

    @cache  # noqa: B019
    def _step(self, choice: Choice) -> Step:
        """Measure the memory and cost of the heaviest micro-batch."""
        batches = self._batches(choice.max_batch_tokens)
        blueprint = replace(
            self._blueprint,
            dtype=self._compute_dtype(choice.sharding),
            checkpointed_share=choice.checkpointed_share,
            accumulates=batches.per_step > 1,
            share=self._shares(choice.sharding)[1],
            sharded=choice.sharding in _SHARDED,
        )
        return measure_step(blueprint, PackedBatch.build(comparisons_of(self._rows, batches.heaviest)))

    def _compute_dtype(self, sharding: Sharding) -> torch.dtype:
        """Return the dtype that weights compute in; sharded weights are gathered in autocast's dtype."""
        stored, autocast = self._blueprint.dtype, self._blueprint.autocast
        gathered = sharding not in ("none", "ddp") and stored == torch.float32
        return autocast if gathered and autocast is not None else stored

    @cache  # noqa: B019
    def _resident_in(self, dtype: torch.dtype) -> ResidentMemory:
        return measure_resident_memory(replace(self._blueprint, dtype=dtype))

    def _resident(self, sharding: Sharding) -> ResidentMemory:
        """Return the memory that stays allocated from step to step, before sharding."""
        if sharding not in ("zero2", "zero3") or self._blueprint.autocast is None:
            return self._resident_in(self._blueprint.dtype)
        # DeepSpeed trains in half precision, and its optimizer has an fp32 copy of the weights.
        half, copy = self._resident_in(self._blueprint.autocast), self._resident_in(torch.float32)
        return replace(half, states=copy.gradients + copy.states, update=copy.update)

    def _shares(self, sharding: Sharding) -> list[float]:
        """Return the fraction of the weights that one process holds, and of the gradients and optimizer states."""
        return [1 / self.gpus if sharding in sharded else 1.0 for sharded in (_SHARDED, (*_SHARDED, "zero2"))]

    def _states(self, sharding: Sharding) -> dict[str, float]:
        """Return the bytes that one process keeps allocated from step to step, by purpose."""
        resident, computing = self._resident(sharding), self._resident_in(self._compute_dtype(sharding))
        weights, share = self._shares(sharding)
        blueprint, outside, layer = self._blueprint, computing.outside_layers, computing.largest_layer
        sharing = {
            "ddp": resident.gradients,
            "fsdp": outside + 2 * layer,  # gathered weights: a layer, the next one, and all outside the layers
            "zero2": _BUCKETS,
            "zero3": _BUCKETS + outside + layer,
        }
        return {
            "weights": resident.weights * weights,
            "reference": resident.gradients * weights if blueprint.reference or blueprint.divergence else 0.0,
            "gradients": resident.gradients * share,
            "optimizer": resident.states * share,
            "activations": 0.0,
            "sharing": sharing.get(sharding, 0.0),
        }

    def _seconds(
        self, step: Step, resident: ResidentMemory, sharding: Sharding, batches: Batches, tokens: int
    ) -> float | None:
        """Return seconds per optimizer step of ``batches``; ``step`` is one micro-batch of ``tokens`` tokens."""
        if self.rates is None:
            return None
        launches = self.rates.overhead * step.cost.operations
        compute = batches.per_step * launches
        compute += (self.rates.seconds(step.cost) - launches) * batches.tokens_per_step / tokens
        update = self._shares(sharding)[1] * (3 * resident.gradients + 2 * resident.states) / self.rates.moved
        sent = (2 * resident.weights + resident.gradients) * batches.per_step  # two gathers and a reduction
        sent = {"none": 0.0, "ddp": 2 * resident.gradients}.get(sharding, sent)
        return max(compute, 0.0 if self.card is None else sent / (1e9 * self.card.link)) + update

    # ---- The fastest choice that fits.

    @property
    def capacity(self) -> float:
        """Bytes that one process can allocate."""
        return psutil.virtual_memory().total if self.card is None else self.card.memory_gb * 2**30

    def fits(self, estimate: Estimate) -> bool:
        """Whether a run with this estimate fits the machine."""
        return estimate.total <= self.capacity

    @property
    def _shardings(self) -> tuple[Sharding, ...]:
        return ("none",) if self.gpus == 1 else ("ddp", "fsdp")

    def fastest(self, shardings: Sequence[Sharding] = ()) -> Estimate | None:
        """Find the fastest choice that fits, and return its estimate, or None if none fits.

        ``shardings`` limits the search; by default all are tried. Choices are first ranked by interpolating between two
        measurements, with and without checkpointing, and the best are then measured individually. If the machine's
        rates are unknown, ddp is preferred over fsdp, less checkpointing over more, and more tokens over fewer.
        """
        middle = max(self.recipe_choice.max_batch_tokens, self.longest)
        budgets = sorted({self.longest, middle, *(budget for budget in _BUDGETS if budget > self.longest)})
        ranked: list[tuple[tuple[float, ...], Choice]] = []
        for preference, sharding in enumerate(shardings or self._shardings):
            if sum(self._states(sharding).values()) > self.capacity:
                continue  # avoids measuring a step, which takes a second or two
            for budget, share in product(budgets, sorted({*_SHARES, self.recipe_choice.checkpointed_share})):
                choice = Choice(budget, share, sharding)
                none, full = (self.estimate(choice, Choice(middle, end, sharding)) for end in (0.0, 1.0))
                if (1 - share) * none.total + share * full.total <= self.capacity:
                    seconds = (1 - share) * (none.step_seconds or 0.0) + share * (full.step_seconds or 0.0)
                    ranked.append(((seconds, preference, share, -budget), choice))
        estimates = (self.estimate(choice) for _, choice in sorted(ranked, key=lambda item: item[0]))
        fitting = islice(filter(self.fits, estimates), _MEASURED if self.rates else 1)
        return min(fitting, key=lambda estimate: estimate.step_seconds or 0.0, default=None)

    def remedy(self, shardings: Sequence[Sharding] = ()) -> str:
        """Explain why no choice with these ``shardings`` fits, and what would."""

        def smallest(shardings: Sequence[Sharding]) -> Estimate:
            choices = [Choice(self.longest, 1.0, sharding) for sharding in shardings]
            return min(map(self.estimate, choices), key=lambda estimate: estimate.total)

        least, sharded, card = smallest(shardings or self._shardings), smallest(self._shardings), self.card
        where = "this machine" if card is None else f"{self.gpus} x {card.name}"
        where += "".join(f" with {sharding}" for sharding in shardings)
        shardable = sum(sharded.memory[name] for name in ("weights", "gradients", "optimizer", "reference"))
        room = self.capacity - (sharded.total - shardable)
        count = math.ceil(shardable * self.gpus / room) if room > 0 else 0
        more = f"fsdp on at least {max(count, 2)} such GPUs, " if card is not None and count else ""
        return (
            f"model_name_or_path: the run does not fit on {where}: even with max_batch_tokens "
            f"{least.choice.max_batch_tokens} and checkpointing, a process needs {least.total / 2**30:.1f} GiB and has "
            f"{self.capacity / 2**30:.1f} GiB; try {more}an adapter (use_peft: true), an optimizer with smaller states "
            "(optim: adamw_8bit), dtype: bfloat16, or a smaller model"
        )

    # ---- Output.

    def describe(self, estimate: Estimate) -> dict[str, Any]:
        """Convert an estimate to plain values in GiB, seconds, tokens per second, kWh and money."""
        seconds = estimate.step_seconds
        total = seconds * self.steps if seconds is not None and self.steps else None
        watts = None if self.card is None else self.card.watts
        hours = None if total is None else total / 3600 * self.gpus
        return {
            "fits": self.fits(estimate),
            "keys": estimate.choice.keys,
            "weights": estimate.parameters,
            "sharding": estimate.choice.sharding,
            "memory_gib": {name: round(size / 2**30, 2) for name, size in estimate.memory.items() if size},
            "total_gib": round(estimate.total / 2**30, 2),
            "capacity_gib": round(self.capacity / 2**30, 2),
            "peak_in": estimate.peak_phase,
            "steps": self.steps or None,
            "tokens_per_step": round(estimate.tokens),
            "teraflop_per_step": estimate.flops / 1e12,
            "step_seconds": seconds,
            "tokens_per_second": None if seconds is None else estimate.tokens / seconds,
            "total_seconds": total,
            "kilowatt_hours": None if hours is None or watts is None else watts * hours / 1000,
            "cost": None if hours is None or self.price is None else self.price * hours,
        }


# ---- The rows of a recipe.


def _rows_of(parts: Sequence[Any], settings: PlanSettings) -> tuple[Dataset, int]:
    """Return a recipe's rows, or one row with the lengths in ``settings``, and the number of rows (0 if unknown).

    If neither is available, prompts and responses get half of max_length each, which is logged.
    """
    _, _, config = parts
    half, count = config.max_length // 2, 1 if settings.command == "sft" else settings.responses
    prompt, response = settings.prompt_tokens or half, settings.response_tokens or half
    if settings.command == "online":
        logger.warning(
            "the plan covers training on answers of response_tokens (default: max_new_tokens); generating and scoring "
            "them takes additional memory and time"
        )
        response, count = settings.response_tokens or config.max_new_tokens, config.num_generations
    elif settings.prompt_tokens is None:
        try:
            data_rows = _read(parts, settings.command)
        except (SimpoError, OSError) as error:
            logger.warning(
                "cannot read the data (%s); assuming %d tokens, half of max_length, for every prompt and every "
                "response; set rows, prompt_tokens and response_tokens to change this",
                one_line(error),
                half,
            )
        else:
            if unused := [key for key in ("rows", "response_tokens") if getattr(settings, key) is not None]:
                logger.warning("%s: unused, because the data is read; set prompt_tokens too", ", ".join(unused))
            return data_rows
    row = {"prompt_ids": [[0] * prompt], "response_ids": [[[0] * response] * count]}
    return Dataset.from_dict(row), settings.rows or 0


def _read(parts: Sequence[Any], command: str) -> tuple[Dataset, int]:
    model, data, config = parts
    rows, _ = load_datasets(data)
    total = len(rows)
    if total > _SAMPLE:
        rows = rows.select(np.sort(np.random.default_rng(0).choice(total, _SAMPLE, replace=False)))
    tokenizer = load_tokenizer(model, chat_template=data.chat_template)
    prepared = KINDS[command].prepare(rows, tokenizer, config, "train")
    return prepared.dataset, round(total * len(prepared.dataset) / len(rows))
