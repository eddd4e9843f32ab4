"""Supervised fine-tuning on packed batches: the average negative log-probability of the assistant's tokens."""

# ruff: noqa: D102 - the base class documents the methods

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simpo.data.tokenizing import Prepared, prepare_sft
from simpo.objectives import Responses
from simpo.runs.results import Metric
from simpo.training.batches import PlannedBatch
from simpo.training.configs import SFTConfig
from simpo.training.metrics import Scores, compare_conversations
from simpo.training.packed import Description, PackedTrainer


class SFTTrainer(PackedTrainer):
    """Trains a causal language model on conversations, on the assistant's turns only.

    A step's loss is the mean over its scored tokens, as everywhere in this field. Arguments and errors are those of
    :class:`~simpo.training.packed.PackedTrainer`.
    """

    metric_names = ("loss",)
    config_type = SFTConfig
    command, row_noun, takes_images = "sft", "conversations", True

    @classmethod
    def describe(cls, args: Any) -> Description:
        return Description(
            "average negative log-probability of the assistant's tokens",
            "fine-tuned on demonstrations, on the assistant's turns only,",
            ["simpo", "sft"],
        )

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        return prepare_sft(dataset, tokenizer, args.tokenize_settings, label=label)

    def row_weights(self, rows: Dataset) -> np.ndarray:
        return scored_tokens(rows)

    def loss_and_metrics(self, y: Responses, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        losses = -y.avg
        return losses, losses.detach()[:, None]

    def compare(self, before: Scores, after: Scores) -> list[Metric]:
        return compare_conversations(before, after)


def scored_tokens(rows: Dataset) -> np.ndarray:
    """``[rows]`` tokens that the loss is about: all of the response, or those that the column ``scored`` marks."""
    table = rows.with_format("arrow")
    sizes = pc.list_value_length(pc.list_flatten(table["response_ids"])).to_numpy()  # one response per row
    if "scored" not in rows.column_names:
        return sizes
    marks = pc.list_flatten(pc.list_flatten(table["scored"])).to_numpy(zero_copy_only=False)
    return np.add.reduceat(marks.astype(np.int64), np.cumsum(sizes) - sizes)
