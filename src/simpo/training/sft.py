"""Supervised fine-tuning on packed batches: the average negative log-probability of the assistant's tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simpo.data.chat_template import end_of_turn
from simpo.data.tokenizing import Prepared, prepare_sft
from simpo.errors import SimpoError
from simpo.objectives import Responses
from simpo.training.batches import PlannedBatch
from simpo.training.packed import PackedTrainer
from simpo.training.settings import TrainingSettings

logger = logging.getLogger(__name__)


@dataclass
class SFTConfig(TrainingSettings):
    """Configuration of supervised fine-tuning.

    All keys of ``transformers.TrainingArguments`` and of :class:`~simpo.training.settings.TrainingSettings`. Learning
    rate and schedule are those of the models that the paper starts from (2e-5, cosine, one epoch).

    Raises:
        SimpoError: a value that is out of bounds, unknown or contradictory; the message names the key.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate; the paper's is 2e-5."})

    def _check(self) -> None:
        if self.truncation == "paper":
            raise SimpoError("truncation: 'paper' is about pairs; use 'prompt' or 'drop'")
        super()._check()


class SFTTrainer(PackedTrainer):
    """Trains a causal language model on conversations, on the assistant's turns only.

    A step's loss is the mean over its scored tokens, as everywhere in this field. Arguments and errors are those of
    :class:`~simpo.training.packed.PackedTrainer`.
    """

    metric_names = ("loss",)
    config_type = SFTConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.processing_class is not None:
            _stop_at_end_of_turn(self.model, self.processing_class)

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize conversations, or prompts with completions."""
        return prepare_sft(dataset, tokenizer, args.tokenize_settings, label=label)

    def row_weights(self, rows: Dataset) -> np.ndarray:
        """``[rows]`` scored tokens."""
        return scored_tokens(rows)

    def loss_and_metrics(self, y: Responses, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Losses, ``[C]``, and figures, ``[C, 1]``, of ``C`` conversations."""
        losses = -y.avg
        return losses, losses.detach()[:, None]


def _stop_at_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation stop where the model learns to: a base model's settings do not know the template's token."""
    end = end_of_turn(tokenizer)
    settings = model.generation_config
    known = settings.eos_token_id
    ids = [] if known is None else known if isinstance(known, list) else [known]
    if end.token_id not in ids:
        settings.eos_token_id = [*ids, end.token_id]
        logger.warning("generation_config: eos_token_id gets %s too, which ends a turn", end.text)


def scored_tokens(rows: Dataset) -> np.ndarray:
    """``[rows]`` tokens that the loss is about: all of the response, or those that ``scored`` marks."""
    table = rows.with_format("arrow")
    if "scored" in rows.column_names:
        marks = pc.list_flatten(pc.list_flatten(table["scored"])).to_numpy(zero_copy_only=False)
    else:
        marks = None
    sizes = pc.list_value_length(pc.list_flatten(table["response_ids"])).to_numpy()  # one response a row
    if marks is None:
        return sizes
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.add.reduceat(marks.astype(np.int64), starts)
