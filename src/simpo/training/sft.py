"""Supervised fine-tuning: the mean loss per answer token, on its own or added to every step of online training."""

# ruff: noqa: D102 - the base class documents the methods

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from simpo.data.sources import load_rows
from simpo.data.tokenizing import Prepared, prepare_sft
from simpo.errors import SimpoError
from simpo.objectives import Responses
from simpo.packing.model import policy_forward
from simpo.runs.results import Metric
from simpo.training.batches import ComparisonRows, PlannedBatch, describe_rows, scored_tokens
from simpo.training.configs import SFTConfig
from simpo.training.metrics import RunningMeans, Scores, compare_conversations
from simpo.training.packed import Description, PackedTrainer


class SFTTrainer(PackedTrainer):
    """Trains a causal language model on the assistant's turns of conversations.

    The loss of a step is the mean over its scored tokens, as usual. Arguments and errors are those of
    :class:`~simpo.training.packed.PackedTrainer`.
    """

    metric_names = ("loss",)
    config_type = SFTConfig
    command, row_noun, takes_images = "sft", "conversations", True

    @classmethod
    def describe(cls, args: Any) -> Description:
        return Description(
            "average negative log-probability of the assistant's tokens",
            "trained by **supervised fine-tuning** (assistant's turns only)",
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


# ---- PPO-ptx: a language modeling loss on other data, added to every step of online training.

PTX = "ptx"  # what messages call the dataset


class Pretraining:
    """Demonstrations whose mean negative log-probability per token is added to every step's loss.

    This is the gamma term of equation 2 in Ouyang et al. 2022, arXiv 2203.02155. The rows of a step depend only on its
    number, so a resumed run uses the same ones. ``name`` is the hub id, file or folder of the dataset; ``means``
    holds the running mean of the loss per token.
    """

    def __init__(self, trainer: Any, name: str) -> None:
        self._trainer = trainer
        self.rows = trainer._tokenize(load_rows(name, split="train"), trainer.processing_class, trainer.args, PTX)
        plan = trainer._plan(self.rows, trainer.args.ptx_batch_size or trainer.args.train_batch_size, training=True)
        self._plan = replace(plan, weights=scored_tokens(self.rows), drop_last=False)
        self._comparisons = ComparisonRows(self.rows)
        self.means = RunningMeans(("ptx/loss",), trainer.args.device)

    def backward(self, model: nn.Module) -> None:
        """Add the gradient of the next step's rows; it is synchronized along with the step's last micro-batch."""
        trainer, args = self._trainer, self._trainer.args
        epoch, number = divmod(trainer.state.global_step, self._plan.steps)
        step = self._plan.step(self._plan.order(epoch), number, args.process_index)
        model.train()
        for micro in step.micro_batches:
            batch = self._comparisons[micro, step.weight].to(args.device)
            with trainer._gradient_sync(model, last=False):
                with trainer.compute_loss_context_manager():
                    losses = -policy_forward(model, batch.packed, path=trainer.path).avg
                    weights = batch.packed.weights.to(losses)
                    loss = (losses * weights).sum() * (args.ptx_weight * args.world_size / step.weight)
                if not losses.isfinite().all():
                    places = describe_rows(self.rows, batch.rows)
                    raise SimpoError(f"ptx_dataset_name: the loss is not finite; rows: {places}; nothing was updated")
                trainer.accelerator.backward(loss)
            self.means.add(losses.detach()[:, None], batch.packed.weights)
