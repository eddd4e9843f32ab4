"""Whether a recipe fits a machine, what it takes there, and which settings are the fastest that fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import psutil
import torch
from datasets import Dataset

from simpo.errors import SimpoError, one_line
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.packing.batching import RowSizes, StepPlan, default_batch_tokens
from simpo.packing.layout import PackedBatch
from simpo.planning.cards import (
    COMMUNICATION,
    CONTEXT,
    FRAGMENTATION,
    Card,
    Rates,
    card_at_hand,
    find_card,
    stored_rates,
)
from simpo.planning.memory import Kept, Setup, Step, measure_kept, measure_step
from simpo.planning.model import Blueprint
from simpo.planning.settings import PlanSettings
from simpo.training.batches import comparisons_of, row_sizes
from simpo.training.online import OnlineTrainer
from simpo.training.packed import PackedTrainer
from simpo.training.preference import PreferenceTrainer
from simpo.training.reward import RewardTrainer
from simpo.training.settings import DataArguments, load_datasets
from simpo.training.sft import SFTTrainer

logger = logging.getLogger(__name__)

KINDS: dict[str, type[PackedTrainer]] = {
    kind.command: kind for kind in (PreferenceTrainer, SFTTrainer, RewardTrainer, OnlineTrainer)
}
Sharding = Literal["none", "ddp", "fsdp", "zero2", "zero3"]

_SAMPLE = 2000  # rows of a large data set that are tokenized
_STEPS = 16  # of the plan that are looked at
_BUDGETS = (2048, 4096, 8192, 16384, 32768)  # tokens of a forward that are tried
_SHARES = (0.0, 0.5, 1.0)  # of checkpointed layers that are tried
_TRIED = 3  # choices that are estimated themselves
_BUCKETS = 2 * 2 * 5e8  # bytes of DeepSpeed's buckets: two of 500 million half-precision numbers


@dataclass(frozen=True)
class Choice:
    """Settings that do not change what is learned."""

    max_batch_tokens: int  # tokens of a forward at most
    checkpointed_share: float  # of the layers that compute their activations again; 0 without checkpointing
    sharding: Sharding  # how processes share weights, gradients and states

    @property
    def keys(self) -> dict[str, Any]:
        """The same as keys of a recipe; sharding is the launcher's."""
        keys: dict[str, Any] = {"max_batch_tokens": self.max_batch_tokens}
        keys["activation_checkpointing"] = self.checkpointed_share > 0
        if 0 < self.checkpointed_share < 1:
            keys["checkpointed_share"] = self.checkpointed_share
        return keys


@dataclass(frozen=True, eq=False)
class Work:
    """The rows of a run, and how steps take them."""

    rows: Dataset  # tokenized rows, all or a sample
    total: int  # number of rows of the data set; 0 if it is not known
    rows_per_step: int  # over all processes
    epochs: float  # passes over the rows
    max_steps: int = -1  # of the run; -1 for those of the epochs
    seed: int | None = 0  # of the order of the rows; None for their own order

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; 0 if that is not known."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(math.ceil(self.total / self.rows_per_step) * self.epochs)

    @cached_property
    def _repeated(self) -> Dataset:
        """The rows, repeated if a sample has fewer than the first steps take."""
        wanted = min(self.total or math.inf, self.rows_per_step * _STEPS)
        return self.rows if len(self.rows) >= wanted else self.rows.select(np.arange(wanted) % len(self.rows))

    @cached_property
    def _sizes(self) -> RowSizes:
        return row_sizes(self._repeated, "packed")

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self._sizes.lengths.max())

    @cache  # noqa: B019 - as that of Planner
    def batches(self, max_batch_tokens: int, world_size: int) -> Batches:
        """The micro-batches of the first steps."""
        sizes = self._sizes
        plan = StepPlan(sizes, self.rows_per_step, max_batch_tokens, world_size, self.seed)
        order, found = plan.order(0), []
        steps = min(plan.steps, _STEPS)
        for number in range(steps):
            found += [micro.rows for step in plan.step_of_ranks(order, number) for micro in step.micro_batches]
        widths = [sizes.together(rows) for rows in found]
        heaviest = found[int(np.argmax(widths))]
        return Batches(
            PackedBatch.build(comparisons_of(self._repeated, heaviest)),
            tokens=max(widths),
            per_step=len(found) / steps / world_size,
            tokens_per_step=sum(widths) / steps / world_size,
        )


@dataclass(frozen=True)
class Batches:
    """The micro-batches of steps."""

    heaviest: PackedBatch  # the one with most tokens
    tokens: int  # of the heaviest
    per_step: float  # micro-batches of a process in a step, on average
    tokens_per_step: float  # of a process


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run with one choice."""

    choice: Choice
    memory: dict[str, float]  # bytes of a process by what they are for, at its peak
    batches: Batches  # its micro-batches
    parameters: int  # of the model
    flops: float  # of a step, over all processes, counted as `torch.utils.flop_counter` does
    step_seconds: float | None  # of an optimizer step; None where the machine's rates are not known
    tightest: str  # what computes at the peak

    @property
    def total(self) -> float:
        """Bytes of a process at its peak."""
        return sum(self.memory.values())


@dataclass(frozen=True, eq=False)
class Planner:
    """Estimates for one recipe on one machine."""

    blueprint: Blueprint  # of the model
    setup: Setup  # how a step is computed
    work: Work  # the rows
    card: Card | None  # of each process; None for a CPU
    gpus: int = 1  # number of processes
    rates: Rates | None = None  # how fast each computes; None if that is not known
    price: float | None = None  # of an hour of one GPU

    @cache  # noqa: B019 - planners are few, and end with the command
    def estimate(self, choice: Choice) -> Estimate:
        """Memory and time of the run with ``choice``."""
        batches, step = self._traced(choice)
        memory = self._memory(choice.sharding, step, step.peak, gradients_first=batches.per_step > 1)
        kept = self._kept(choice.sharding)
        update = self._memory(choice.sharding, step, kept.update * self._share(choice.sharding))
        tightest = max(step.peaks, key=lambda name: step.peaks[name])
        if sum(update.values()) > sum(memory.values()):
            memory, tightest = update, "the optimizer's step"
        return Estimate(
            choice,
            memory,
            batches,
            parameters=round(kept.parameters),
            flops=step.cost.flops * batches.tokens_per_step / batches.tokens * self.gpus,
            step_seconds=self._seconds(choice, batches),
            tightest=tightest,
        )

    @cache  # noqa: B019
    def _kept_in(self, dtype: torch.dtype) -> Kept:
        return measure_kept(replace(self.blueprint, dtype=dtype), self.setup)

    def _kept(self, sharding: Sharding) -> Kept:
        """The memory that stays allocated from step to step, before anything is sharded."""
        if sharding not in ("zero2", "zero3") or self.setup.autocast is None:
            return self._kept_in(self.blueprint.dtype)
        # DeepSpeed trains in half precision, and its optimizer has an fp32 copy of the weights.
        half, copy = self._kept_in(self.setup.autocast), self._kept_in(torch.float32)
        return replace(half, states=copy.gradients + copy.states, update=copy.update)

    @cache  # noqa: B019
    def _traced(self, choice: Choice) -> tuple[Batches, Step]:
        """The micro-batches of ``choice``, and what the heaviest of them takes."""
        batches = self.work.batches(choice.max_batch_tokens, self.gpus)
        setup = replace(self.setup, accumulates=batches.per_step > 1, share=self._share(choice.sharding))
        blueprint = replace(self.blueprint, checkpointed_share=choice.checkpointed_share)
        if choice.sharding not in ("none", "ddp") and setup.autocast is not None and blueprint.dtype == torch.float32:
            # weights are in half precision where they compute, so that autocast has nothing to cast
            blueprint = replace(blueprint, dtype=setup.autocast)
        return batches, measure_step(blueprint, batches.heaviest, setup)

    def _share(self, sharding: Sharding) -> float:
        """Share of the gradients and of the optimizer's work that a process has."""
        return 1 / self.gpus if sharding in ("fsdp", "zero2", "zero3") else 1.0

    def _memory(self, sharding: Sharding, step: Step, peak: float, *, gradients_first: bool = True) -> dict[str, float]:
        """Bytes of a process where forward and backward, or the optimizer, need ``peak`` on top of what is kept.

        Gradients are there before, or part of the peak.
        """
        found = self._states(sharding)
        found["activations"] = peak - (0.0 if gradients_first else found["gradients"])
        found["sharing"] = 0.0
        if sharding == "ddp":
            found["sharing"] = self._kept(sharding).gradients
        elif sharding == "fsdp":  # what is gathered: a layer and the next one, and what no layer has
            found["sharing"] = step.outside_layers + 2 * step.largest_layer
        elif sharding in ("zero2", "zero3"):
            found["sharing"] = _BUCKETS + (step.outside_layers + step.largest_layer if sharding == "zero3" else 0.0)
        if self.card is not None:
            found["context"] = CONTEXT + (COMMUNICATION if self.gpus > 1 else 0.0)
            found["fragmentation"] = FRAGMENTATION * sum(found.values())
        return found

    def _states(self, sharding: Sharding) -> dict[str, float]:
        """Bytes of a process that stay allocated from step to step, by what they are for."""
        kept, share = self._kept(sharding), self._share(sharding)
        weights = 1 / self.gpus if sharding in ("fsdp", "zero3") else 1.0
        return {
            "weights": kept.weights * weights,
            "reference": kept.gradients * weights if self.setup.reference or self.setup.divergence else 0.0,
            "gradients": kept.gradients * share,
            "optimizer": kept.states * share,
        }

    def _seconds(self, choice: Choice, batches: Batches) -> float | None:
        """Seconds of an optimizer step with ``batches``, in proportion to the tokens of those of ``choice``."""
        rates, sharding = self.rates, choice.sharding
        if rates is None:
            return None
        (traced, step), kept = self._traced(choice), self._kept(sharding)
        launches, cost = rates.overhead * step.cost.operations, step.cost
        compute = batches.per_step * launches
        compute += (rates.seconds(cost) - launches) * batches.tokens_per_step / traced.tokens
        update = (3 * kept.gradients + 2 * kept.states) / rates.moved
        if self.card is None or self.gpus == 1:
            return compute + update
        if sharding == "ddp":
            return max(compute, 2 * kept.gradients / self.card.link) + update
        gathered = (2 * kept.weights + kept.gradients) * batches.per_step
        return max(compute, gathered / self.card.link) + update / self.gpus

    # ---- The fastest choice that fits.

    @property
    def capacity(self) -> float:
        """Bytes that a process can allocate."""
        return psutil.virtual_memory().total if self.card is None else self.card.memory

    def fits(self, estimate: Estimate) -> bool:
        """Whether a run with this estimate fits the machine."""
        return estimate.total <= self.capacity

    @property
    def shardings(self) -> tuple[Sharding, ...]:
        """The ways of sharing that are compared unless one is requested."""
        return ("none",) if self.gpus == 1 else ("ddp", "fsdp")

    def fastest(self, own: Choice, shardings: Sequence[Sharding] = ()) -> Estimate | None:
        """With the choice that takes the fewest seconds of those that fit; None if none does.

        Choices are ranked by two estimates for each way of sharing, with and without checkpointing: activations and
        arithmetic are in proportion to tokens. The best ones are then estimated themselves. Where the machine's rates
        are not known, ddp comes before fsdp, less checkpointing before more, and more tokens before fewer.

        ``own`` is the recipe's choice, which is one of them. Without ``shardings``, all of :attr:`shardings` are
        possible.
        """
        found: list[Estimate] = []
        for choice in self._ranked(own, shardings or self.shardings):
            estimate = self.estimate(choice)
            if self.fits(estimate):
                found.append(estimate)
            if len(found) == (1 if self.rates is None else _TRIED):
                break
        return min(found, key=lambda estimate: estimate.step_seconds or 0.0, default=None)

    def smallest(self, shardings: Sequence[Sharding] = ()) -> Estimate:
        """With the choice that takes the least memory."""
        choices = [Choice(self.work.longest, 1.0, sharding) for sharding in shardings or self.shardings]
        return min(map(self.estimate, choices), key=lambda estimate: estimate.total)

    def _ranked(self, own: Choice, shardings: Sequence[Sharding]) -> list[Choice]:
        """Choices that seem to fit, the fastest first."""
        longest = self.work.longest
        middle = max(own.max_batch_tokens, longest)
        budgets = sorted({longest, middle, *(budget for budget in _BUDGETS if budget > longest)})
        by_budget = {budget: self.work.batches(budget, self.gpus) for budget in budgets}
        found: list[tuple[tuple[float, ...], Choice]] = []
        for place, sharding in enumerate(shardings):
            if sum(self._states(sharding).values()) > self.capacity:
                continue  # without tracing a step, which takes a second or two
            again = self.estimate(Choice(middle, 1.0, sharding))
            if again.total - again.memory["activations"] > self.capacity:
                continue
            kept = self.estimate(Choice(middle, 0.0, sharding))
            for share in sorted({*_SHARES, own.checkpointed_share}):
                activations = share * again.memory["activations"] + (1 - share) * kept.memory["activations"]
                for budget, batches in by_budget.items():
                    total = again.total + activations * batches.tokens / again.batches.tokens
                    if total - again.memory["activations"] <= self.capacity:
                        rank: tuple[float, ...] = (place, share, -budget)
                        ends = [self._seconds(one.choice, batches) for one in (kept, again)]
                        if ends[0] is not None and ends[1] is not None:
                            rank = ((1 - share) * ends[0] + share * ends[1], *rank)
                        found.append((rank, Choice(budget, share, sharding)))
        return [choice for _, choice in sorted(found, key=lambda each: each[0])]

    # ---- What is reported.

    def remedy(self, shardings: Sequence[Sharding] = ()) -> str:
        """Advice on making the run fit, where no choice with these ``shardings`` does."""
        least, card = self.smallest(shardings), self.card
        where = "this machine" if card is None else f"{self.gpus} x {card.name}"
        where += "".join(f" with {sharding}" for sharding in shardings)
        shared, sharded = ("weights", "gradients", "optimizer", "reference"), self.smallest()
        kept = sum(sharded.memory[name] for name in shared) * (self.gpus if self.gpus > 1 else 1)
        room = self.capacity - (sharded.total - sum(sharded.memory[name] for name in shared))
        count = math.ceil(kept / room) if room > 0 else 0
        more = f"fsdp on {max(count, 2)} such GPUs or more, " if card is not None and count else ""
        return (
            f"model_name_or_path: the run does not fit {where}: at the least, with max_batch_tokens "
            f"{least.choice.max_batch_tokens} and checkpointing, a process needs {least.total / 2**30:.1f} GiB of "
            f"{self.capacity / 2**30:.1f} GiB; what would fit: {more}an adapter (use_peft: true), an optimizer with "
            "smaller states (optim: adamw_8bit), dtype: bfloat16, or a smaller model"
        )

    def described(self, estimate: Estimate) -> dict[str, Any]:
        """An estimate as plain values: GiB, seconds, tokens per second, kWh, money."""
        seconds = estimate.step_seconds
        tokens = estimate.batches.tokens_per_step * self.gpus
        total = seconds * self.work.steps if seconds is not None and self.work.steps else None
        watts = None if self.card is None or math.isnan(self.card.watts) else self.card.watts
        hours = None if total is None else total / 3600 * self.gpus
        return {
            "fits": self.fits(estimate),
            "keys": estimate.choice.keys,
            "weights": estimate.parameters,
            "sharding": estimate.choice.sharding,
            "memory_gib": {name: round(size / 2**30, 2) for name, size in estimate.memory.items() if size},
            "total_gib": round(estimate.total / 2**30, 2),
            "capacity_gib": round(self.capacity / 2**30, 2),
            "peak_in": estimate.tightest,
            "steps": self.work.steps or None,
            "tokens_per_step": round(tokens),
            "teraflop_per_step": estimate.flops / 1e12,
            "step_seconds": seconds,
            "tokens_per_second": None if seconds is None else tokens / seconds,
            "total_seconds": total,
            "kilowatt_hours": None if hours is None or watts is None else watts * hours / 1000,
            "cost": None if hours is None or self.price is None else self.price * hours,
        }


# ---- From a recipe to its planner.


def make_plan(parts: Sequence[Any], settings: PlanSettings, rows: Dataset | None = None) -> tuple[Planner, Estimate]:
    """The planner of a recipe, and the estimate for its own settings.

    ``rows`` are all rows of the run, tokenized; by default those of the recipe's data, or of the settings.
    """
    model, data, config = parts
    given = (settings.gpu, settings.gpu_memory_gb, settings.gpu_tflops, settings.gpu_terabytes)
    here = all(value is None for value in given)
    card = card_at_hand() if here else find_card(*given)
    rates = (stored_rates() if here else None) or (None if card is None else card.rates)
    total = 0 if rows is None else len(rows)
    if rows is None:
        rows, total = _rows_of(model, data, config, settings)
    work = Work(
        rows,
        total,
        rows_per_step=config.per_device_train_batch_size * settings.gpus,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed if config.data_seed is None else config.data_seed,
    )
    row = getattr(config, "row", None)  # the objective
    setup = Setup(
        optimizer=getattr(config.optim, "value", config.optim),
        cuda=card is not None,
        autocast=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
        reference=row is not None and row.needs_reference and not config.precompute_ref_log_probs,
        divergence=bool(getattr(config, "kl_weight", 0.0)),
        pair_weights=getattr(config, "wpo_weights", False),
    )
    blueprint = Blueprint.read(model, reward=settings.command == "reward", path=config.forward_path)
    planner = Planner(blueprint, setup, work, card, settings.gpus, rates, settings.price)
    again = getattr(config, "activation_checkpointing", False) or config.gradient_checkpointing
    own = Choice(
        config.max_batch_tokens or default_batch_tokens(work.longest, cpu=card is None),
        config.checkpointed_share if again else 0.0,
        "none" if settings.gpus == 1 else settings.sharding or "fsdp",
    )
    return planner, planner.estimate(own)


def _rows_of(model: ModelArguments, data: DataArguments, config: Any, settings: PlanSettings) -> tuple[Dataset, int]:
    """Rows of a recipe, or one row of the lengths that ``settings`` gives, and how many there are; 0 if unknown.

    Where neither is known, half of a row's max_length is its prompt, which is reported.
    """
    half, count = config.max_length // 2, 1 if settings.command == "sft" else settings.responses
    prompt, response = settings.prompt_tokens or half, settings.response_tokens or half
    if settings.command == "online":
        logger.warning(
            "the plan is for training on answers of max_new_tokens or response_tokens; generating and scoring them "
            "takes memory and time on top"
        )
        response, count = settings.response_tokens or config.max_new_tokens, config.num_generations
    elif settings.prompt_tokens is None:
        try:
            found = _read(model, data, config, settings.command)
        except (SimpoError, OSError) as error:
            logger.warning(
                "the data is not known (%s): every prompt and every response is taken to have %d tokens, half of "
                "max_length; give rows, prompt_tokens and response_tokens for others",
                one_line(error),
                half,
            )
        else:
            if unused := [key for key in ("rows", "response_tokens") if getattr(settings, key) is not None]:
                logger.warning("%s: not used, because the data is read; give prompt_tokens too", ", ".join(unused))
            return found
    row = {"prompt_ids": [[0] * prompt], "response_ids": [[[0] * response] * count]}
    return Dataset.from_dict(row), settings.rows or 0


def _read(model: ModelArguments, data: DataArguments, config: Any, command: str) -> tuple[Dataset, int]:
    rows, _ = load_datasets(data)
    total = len(rows)
    if total > _SAMPLE:
        rows = rows.select(np.sort(np.random.default_rng(0).choice(total, _SAMPLE, replace=False)))
    tokenizer = load_tokenizer(model.model_name_or_path, model, chat_template=data.chat_template)
    prepared = KINDS[command].prepare(rows, tokenizer, config, "train")
    return prepared.dataset, round(total * len(prepared.dataset) / len(rows))
