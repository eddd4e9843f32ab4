"""From a recipe to what is planned: the model's blueprint, how a step is computed, and the rows or their lengths."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from simpo.errors import SimpoError, one_line
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.packing.batching import default_batch_tokens
from simpo.planning.lengths import Lengths
from simpo.planning.memory import Setup
from simpo.planning.model import Blueprint
from simpo.planning.search import Choice, Sharding, Work
from simpo.training.online import OnlineTrainer
from simpo.training.packed import PackedTrainer
from simpo.training.preference import PreferenceTrainer
from simpo.training.reward import RewardTrainer
from simpo.training.settings import DataArguments, load_datasets
from simpo.training.sft import SFTTrainer

logger = logging.getLogger(__name__)

_SAMPLE = 2000  # rows of a large data set that are tokenized


def kind_of(command: str) -> type[PackedTrainer]:
    """The trainer of a command."""
    return {"train": PreferenceTrainer, "sft": SFTTrainer, "reward": RewardTrainer, "online": OnlineTrainer}[command]


def blueprint_of(kind: type[PackedTrainer], model: ModelArguments, config: Any) -> Blueprint:
    """The model of a recipe."""
    return Blueprint.read(model, reward=kind.command == "reward", path=config.forward_path)


def setup_of(config: Any, *, cuda: bool) -> Setup:
    """How a recipe's step is computed."""
    row = getattr(config, "row", None)
    divergence = bool(getattr(config, "kl_weight", 0.0))
    stored = getattr(config, "precompute_ref_log_probs", True)
    return Setup(
        optimizer=getattr(config.optim, "value", config.optim),
        cuda=cuda,
        autocast=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
        reference=row is not None and row.needs_reference and not stored,
        divergence=divergence,
    )


def own_choice(config: Any, work: Work, sharding: Sharding, *, cuda: bool) -> Choice:
    """What a recipe itself chooses."""
    longest = int(work.sizes("packed").lengths.max())
    tokens = config.max_batch_tokens or default_batch_tokens(longest, cpu=not cuda)
    again = getattr(config, "activation_checkpointing", False) or config.gradient_checkpointing
    return Choice(tokens, config.checkpointed_share if again else 0.0, sharding)


def work_of(
    kind: type[PackedTrainer],
    model: ModelArguments,
    data: DataArguments,
    config: Any,
    gpus: int,
    lengths: Lengths,
) -> Work:
    """The rows of a recipe, or a sample of them, tokenized; or rows of ``lengths`` where these are given.

    Where neither is known, half of a row's max_length is its prompt, which is reported.
    """
    rows, total = None, lengths.rows or 0
    half, count = config.max_length // 2, 1 if kind.command == "sft" else lengths.responses
    prompt, response = lengths.prompt_tokens or half, lengths.response_tokens or half
    if kind.command == "online":
        logger.warning(
            "the plan is for training on answers of max_new_tokens or response_tokens; generating and scoring them "
            "takes memory and time on top"
        )
        response, count = lengths.response_tokens or config.max_new_tokens, config.num_generations
    elif lengths.prompt_tokens is None:
        try:
            rows, total = _read(kind, model, data, config)
        except (SimpoError, OSError) as error:
            logger.warning(
                "the data is not known (%s): every prompt and every response is taken to have %d tokens, half of "
                "max_length; give rows, prompt_tokens and response_tokens for others",
                one_line(error),
                half,
            )
        else:
            if unused := [key for key in ("rows", "response_tokens") if getattr(lengths, key) is not None]:
                logger.warning("%s: not used, because the data is read; give prompt_tokens too", ", ".join(unused))
    if rows is None:
        rows = Dataset.from_dict({"prompt_ids": [[0] * prompt], "response_ids": [[[0] * response] * count]})
    return Work(
        rows,
        total,
        rows_per_step=config.per_device_train_batch_size * gpus,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed if config.data_seed is None else config.data_seed,
    )


def _read(kind: type[PackedTrainer], model: ModelArguments, data: DataArguments, config: Any) -> tuple[Dataset, int]:
    rows, _ = load_datasets(data)
    total = len(rows)
    if total > _SAMPLE:
        rows = rows.select(np.sort(np.random.default_rng(0).choice(total, _SAMPLE, replace=False)))
    tokenizer = load_tokenizer(model.model_name_or_path, model, chat_template=data.chat_template)
    prepared = kind.prepare(rows, tokenizer, config, "train")
    return prepared.dataset, round(total * len(prepared.dataset) / len(rows))
