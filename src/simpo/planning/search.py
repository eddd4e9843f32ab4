"""Whether a recipe fits a machine, what it takes there, and which settings are the fastest that fit."""

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

from simpo.errors import SimpoError, one_line
from simpo.models.loading import load_tokenizer
from simpo.packing.batching import StepPlan, default_batch_tokens
from simpo.packing.layout import PackedBatch
from simpo.planning.cards import (
    COMMUNICATION,
    CONTEXT,
    FRAGMENTATION,
    card_at_hand,
    find_card,
    machine_name,
    stored_rates,
)
from simpo.planning.memory import Kept, Step, measure_kept, measure_step
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

_SHARDED = ("fsdp", "zero3")  # share out the weights too

_SAMPLE = 2000  # rows of a large data set that are tokenized
_STEPS = 16  # of the run that are looked at
_BUDGETS = (2048, 4096, 8192, 16384, 32768)  # tokens of a forward that are tried
_SHARES = (0.0, 0.5, 1.0)  # of checkpointed layers that are tried
_TRIED = 3  # choices that are measured themselves
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


@dataclass(frozen=True)
class Batches:
    """The micro-batches of the first steps."""

    heaviest: tuple[int, ...]  # rows of the one with most tokens
    tokens: int  # of the heaviest
    per_step: float  # micro-batches of a process in a step, on average
    tokens_per_step: float  # of a process


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run with one choice."""

    choice: Choice
    memory: dict[str, float]  # bytes of a process by what they are for, at its peak
    parameters: int  # of the model
    tokens: float  # of a step, over all processes
    flops: float  # of a step, over all processes, counted as `torch.utils.flop_counter` does
    step_seconds: float | None  # of an optimizer step; None where the machine's rates are not known
    tightest: str  # what computes at the peak

    @property
    def total(self) -> float:
        """Bytes of a process at its peak."""
        return sum(self.memory.values())


class Planner:
    """Estimates for one recipe on one machine.

    Args:
        parts: the recipe as settings of the model, of the data and of the training.
        settings: the machine, and the rows if the data is not read.
        rows: all rows of the run, tokenized; by default those of the data, or of ``settings``.

    Attributes:
        card: the card of each process; None for a CPU.
        rates: how fast it computes; None if that is not known.
        own: the recipe's own choice.
    """

    def __init__(self, parts: Sequence[Any], settings: PlanSettings, rows: Dataset | None = None) -> None:
        model, _, config = parts
        self.gpus, self.price = settings.gpus, settings.price
        given = (settings.gpu, settings.gpu_memory_gb, settings.gpu_tflops, settings.gpu_terabytes)
        here = all(value is None for value in given)
        self.card = card_at_hand() if here else find_card(*given)
        autocast = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
        stored = stored_rates().get(machine_name(half=autocast is not None)) if here else None
        self.rates = stored or (None if self.card is None else self.card.rates)
        rows, total = (rows, len(rows)) if rows is not None else _rows_of(parts, settings)
        self._rows_per_step = config.per_device_train_batch_size * self.gpus
        wanted = self._rows_per_step * _STEPS if not total else min(total, self._rows_per_step * _STEPS)
        # A sample can have fewer rows than the first steps take.
        self._rows = rows if len(rows) >= wanted else rows.select(np.arange(wanted) % len(rows))
        self._sizes = row_sizes(self._rows, "packed")
        self.longest = int(self._sizes.lengths.max())
        self._seed = config.seed if config.data_seed is None else config.data_seed
        # 0 where the number of rows is not known
        self.steps = max(config.max_steps, 0) or math.ceil(
            math.ceil(total / self._rows_per_step) * config.num_train_epochs
        )
        row = getattr(config, "row", None)  # the objective
        self._blueprint = Blueprint.read(
            model,
            reward=settings.command == "reward",
            path=config.forward_path,
            optimizer=getattr(config.optim, "value", config.optim),
            cuda=self.card is not None,
            autocast=autocast,
            reference=row is not None and row.needs_reference and not config.precompute_ref_log_probs,
            divergence=bool(getattr(config, "kl_weight", 0.0)),
            pair_weights=getattr(config, "wpo_weights", False),
        )
        again = getattr(config, "activation_checkpointing", False) or config.gradient_checkpointing
        self.own = Choice(
            config.max_batch_tokens or default_batch_tokens(self.longest, cpu=self.card is None),
            config.checkpointed_share if again else 0.0,
            "none" if self.gpus == 1 else settings.sharding or "fsdp",
        )

    # ---- One choice.

    def estimate(self, choice: Choice, like: Choice | None = None) -> Estimate:
        """Memory and time of the run with ``choice``.

        With ``like``, its micro-batch is what is measured, and activations and arithmetic are in proportion to tokens.
        """
        like = like or choice
        batches, measured = self._batches(choice.max_batch_tokens), self._batches(like.max_batch_tokens)
        step, kept, memory = self._step(like), self._kept(choice.sharding), self._states(choice.sharding)
        peak = step.peaks[step.tightest] - (0.0 if measured.per_step > 1 else memory["gradients"])
        activations = peak * batches.tokens / measured.tokens
        update = kept.update * self._shares(choice.sharding)[1]
        memory["activations"] = max(activations, update)
        if self.card is not None:
            memory["context"] = CONTEXT + (COMMUNICATION if self.gpus > 1 else 0.0)
            memory["fragmentation"] = FRAGMENTATION * sum(memory.values())
        return Estimate(
            choice,
            memory,
            parameters=kept.parameters,
            tokens=batches.tokens_per_step * self.gpus,
            flops=step.cost.flops * batches.tokens_per_step / measured.tokens * self.gpus,
            step_seconds=self._seconds(step, kept, choice.sharding, batches, measured.tokens),
            tightest="the optimizer's step" if update > activations else step.tightest,
        )

    @cache  # noqa: B019 - planners are few, and end with the command
    def _batches(self, max_batch_tokens: int) -> Batches:
        plan = StepPlan(self._sizes, self._rows_per_step, max_batch_tokens, self.gpus, self._seed)
        order, steps = plan.order(0), min(plan.steps, _STEPS)
        shares = [share for number in range(steps) for share in plan.step_of_ranks(order, number)]
        found = [micro.rows for share in shares for micro in share.micro_batches]
        tokens = [self._sizes.together(rows) for rows in found]
        return Batches(
            found[int(np.argmax(tokens))],
            tokens=max(tokens),
            per_step=len(found) / len(shares),
            tokens_per_step=sum(tokens) / len(shares),
        )

    @cache  # noqa: B019
    def _step(self, choice: Choice) -> Step:
        """Memory and cost of the heaviest micro-batch."""
        batches = self._batches(choice.max_batch_tokens)
        blueprint = replace(
            self._blueprint,
            dtype=self._computed(choice.sharding),
            checkpointed_share=choice.checkpointed_share,
            accumulates=batches.per_step > 1,
            share=self._shares(choice.sharding)[1],
        )
        return measure_step(blueprint, PackedBatch.build(comparisons_of(self._rows, batches.heaviest)))

    def _computed(self, sharding: Sharding) -> torch.dtype:
        """The type of the weights where they compute: of shared ones that of autocast, which has nothing to cast."""
        own, autocast = self._blueprint.dtype, self._blueprint.autocast
        gathered = sharding not in ("none", "ddp") and own == torch.float32
        return autocast if gathered and autocast is not None else own

    @cache  # noqa: B019
    def _kept_in(self, dtype: torch.dtype) -> Kept:
        return measure_kept(replace(self._blueprint, dtype=dtype))

    def _kept(self, sharding: Sharding) -> Kept:
        """The memory that stays allocated from step to step, before anything is sharded."""
        if sharding not in ("zero2", "zero3") or self._blueprint.autocast is None:
            return self._kept_in(self._blueprint.dtype)
        # DeepSpeed trains in half precision, and its optimizer has an fp32 copy of the weights.
        half, copy = self._kept_in(self._blueprint.autocast), self._kept_in(torch.float32)
        return replace(half, states=copy.gradients + copy.states, update=copy.update)

    def _shares(self, sharding: Sharding) -> list[float]:
        """The fraction of the weights that one process holds, and that of the gradients and optimizer states."""
        return [1 / self.gpus if sharding in sharded else 1.0 for sharded in (_SHARDED, (*_SHARDED, "zero2"))]

    def _states(self, sharding: Sharding) -> dict[str, float]:
        """Bytes of a process that stay allocated from step to step, by what they are for."""
        kept, computed = self._kept(sharding), self._kept_in(self._computed(sharding))
        weights, share = self._shares(sharding)
        blueprint, outside, layer = self._blueprint, computed.outside_layers, computed.largest_layer
        sharing = {
            "ddp": kept.gradients,
            "fsdp": outside + 2 * layer,  # what is gathered: a layer and the next one, and what no layer has
            "zero2": _BUCKETS,
            "zero3": _BUCKETS + outside + layer,
        }
        return {
            "weights": kept.weights * weights,
            "reference": kept.gradients * weights if blueprint.reference or blueprint.divergence else 0.0,
            "gradients": kept.gradients * share,
            "optimizer": kept.states * share,
            "activations": 0.0,
            "sharing": sharing.get(sharding, 0.0),
        }

    def _seconds(self, step: Step, kept: Kept, sharding: Sharding, batches: Batches, tokens: int) -> float | None:
        """Seconds per optimizer step of ``batches``; ``step`` is the cost of one micro-batch of ``tokens`` tokens."""
        if self.rates is None:
            return None
        launches = self.rates.overhead * step.cost.operations
        compute = batches.per_step * launches
        compute += (self.rates.seconds(step.cost) - launches) * batches.tokens_per_step / tokens
        update = self._shares(sharding)[1] * (3 * kept.gradients + 2 * kept.states) / self.rates.moved
        sent = (2 * kept.weights + kept.gradients) * batches.per_step  # gathered twice, and reduced
        sent = {"none": 0.0, "ddp": 2 * kept.gradients}.get(sharding, sent)
        return max(compute, 0.0 if self.card is None else sent / (1e9 * self.card.link)) + update

    # ---- The fastest choice that fits.

    @property
    def capacity(self) -> float:
        """Bytes that a process can allocate."""
        return psutil.virtual_memory().total if self.card is None else self.card.memory_gb * 2**30

    def fits(self, estimate: Estimate) -> bool:
        """Whether a run with this estimate fits the machine."""
        return estimate.total <= self.capacity

    @property
    def _shardings(self) -> tuple[Sharding, ...]:
        return ("none",) if self.gpus == 1 else ("ddp", "fsdp")

    def fastest(self, shardings: Sequence[Sharding] = ()) -> Estimate | None:
        """With the choice that takes the fewest seconds of those that fit; None if none does.

        ``shardings`` are possible, by default all. Choices are ranked by two measured ones for each, with and without
        checkpointing. The best are then measured themselves. Where the machine's rates are not known, ddp comes before
        fsdp, less checkpointing before more, and more tokens before fewer.
        """
        middle = max(self.own.max_batch_tokens, self.longest)
        budgets = sorted({self.longest, middle, *(budget for budget in _BUDGETS if budget > self.longest)})
        ranked: list[tuple[tuple[float, ...], Choice]] = []
        for place, sharding in enumerate(shardings or self._shardings):
            if sum(self._states(sharding).values()) > self.capacity:
                continue  # without measuring a step, which takes a second or two
            for budget, share in product(budgets, sorted({*_SHARES, self.own.checkpointed_share})):
                choice = Choice(budget, share, sharding)
                without, again = (self.estimate(choice, Choice(middle, end, sharding)) for end in (0.0, 1.0))
                if (1 - share) * without.total + share * again.total <= self.capacity:
                    seconds = (1 - share) * (without.step_seconds or 0.0) + share * (again.step_seconds or 0.0)
                    ranked.append(((seconds, place, share, -budget), choice))
        estimates = (self.estimate(choice) for _, choice in sorted(ranked, key=lambda each: each[0]))
        found = islice(filter(self.fits, estimates), _TRIED if self.rates else 1)
        return min(found, key=lambda estimate: estimate.step_seconds or 0.0, default=None)

    def remedy(self, shardings: Sequence[Sharding] = ()) -> str:
        """Advice on making the run fit, where no choice with these ``shardings`` does."""

        def smallest(shardings: Sequence[Sharding]) -> Estimate:
            choices = [Choice(self.longest, 1.0, sharding) for sharding in shardings]
            return min(map(self.estimate, choices), key=lambda estimate: estimate.total)

        least, sharded, card = smallest(shardings or self._shardings), smallest(self._shardings), self.card
        where = "this machine" if card is None else f"{self.gpus} x {card.name}"
        where += "".join(f" with {sharding}" for sharding in shardings)
        kept = sum(sharded.memory[name] for name in ("weights", "gradients", "optimizer", "reference"))
        room = self.capacity - (sharded.total - kept)
        count = math.ceil(kept * self.gpus / room) if room > 0 else 0
        more = f"fsdp on {max(count, 2)} such GPUs or more, " if card is not None and count else ""
        return (
            f"model_name_or_path: the run does not fit {where}: at the least, with max_batch_tokens "
            f"{least.choice.max_batch_tokens} and checkpointing, a process needs {least.total / 2**30:.1f} GiB of "
            f"{self.capacity / 2**30:.1f} GiB; what would fit: {more}an adapter (use_peft: true), an optimizer with "
            "smaller states (optim: adamw_8bit), dtype: bfloat16, or a smaller model"
        )

    # ---- What is reported.

    def described(self, estimate: Estimate) -> dict[str, Any]:
        """An estimate as plain values: GiB, seconds, tokens per second, kWh, money."""
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
            "peak_in": estimate.tightest,
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
    """Rows of a recipe, or one row of the lengths that ``settings`` gives, and how many there are; 0 if unknown.

    Where neither is known, half of a row's max_length is its prompt, which is reported.
    """
    _, _, config = parts
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
            found = _read(parts, settings.command)
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


def _read(parts: Sequence[Any], command: str) -> tuple[Dataset, int]:
    model, data, config = parts
    rows, _ = load_datasets(data)
    total = len(rows)
    if total > _SAMPLE:
        rows = rows.select(np.sort(np.random.default_rng(0).choice(total, _SAMPLE, replace=False)))
    tokenizer = load_tokenizer(model, chat_template=data.chat_template)
    prepared = KINDS[command].prepare(rows, tokenizer, config, "train")
    return prepared.dataset, round(total * len(prepared.dataset) / len(rows))
