"""From a recipe to its planner: the model's blueprint, how a step is computed, and the rows or their lengths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from simpo.errors import SimpoError, one_line
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.packing.batching import default_batch_tokens
from simpo.planning.cards import card_at_hand, find_card, stored_rates
from simpo.planning.memory import Setup
from simpo.planning.model import Blueprint
from simpo.planning.search import Choice, Estimate, Machine, Planner, Work
from simpo.planning.settings import PlanSettings
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
_SAMPLE = 2000  # rows of a large data set that are tokenized


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
    blueprint = Blueprint.read(model, reward=settings.command == "reward", path=config.forward_path)
    machine = Machine(card, settings.gpus, rates, settings.price)
    planner = Planner(blueprint, _setup_of(config, cuda=card is not None), work, machine)
    again = getattr(config, "activation_checkpointing", False) or config.gradient_checkpointing
    own = Choice(
        config.max_batch_tokens or default_batch_tokens(work.longest, cpu=card is None),
        config.checkpointed_share if again else 0.0,
        "none" if settings.gpus == 1 else settings.sharding or "fsdp",
    )
    return planner, planner.estimate(own)


def _setup_of(config: Any, *, cuda: bool) -> Setup:
    """The setup of a recipe's step."""
    row = getattr(config, "row", None)
    stored = getattr(config, "precompute_ref_log_probs", True)
    return Setup(
        optimizer=getattr(config.optim, "value", config.optim),
        cuda=cuda,
        autocast=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
        reference=row is not None and row.needs_reference and not stored,
        divergence=bool(getattr(config, "kl_weight", 0.0)),
        pair_weights=getattr(config, "wpo_weights", False),
    )


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
