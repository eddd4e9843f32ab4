"""The trainer behind the names of TRL's preference trainers and of the paper's ``SimPOTrainer``."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from simpo.compat.base import PortedTrainer
from simpo.errors import SimpoError
from simpo.objectives import Responses, sft_term
from simpo.training.batches import PlannedBatch
from simpo.training.preference import PreferenceTrainer


class PortedPreferenceTrainer(PortedTrainer, PreferenceTrainer):
    """Takes what TRL's ``CPOTrainer`` and ``ORPOTrainer`` and the paper's ``SimPOTrainer`` take, in their order.

    The SFT term, and that of ORPO, is the mean over all tokens of a step's chosen responses, so that a long response
    counts more.

    Args:
        model: a model, or the name or folder of one, then loaded with ``args.model_init_kwargs``.
        args: a ``config_class``.
        data_collator: not supported.
        train_dataset: pairs. Strings are read as they are, conversations through the chat template.
        eval_dataset: pairs, or several data sets by name.
        processing_class: the tokenizer; by default the one saved with the model.
        model_init: not supported.
        callbacks: as for ``Trainer``.
        optimizers: as for ``Trainer``.
        preprocess_logits_for_metrics: not supported.
        peft_config: an adapter to add to the model and train.
        compute_metrics: not supported.
        tokenizer: the older name of ``processing_class``.
        ref_model: must have the weights of ``model``.
        quantization_config: not supported.

    Raises:
        SimpoError: an argument that is not supported, named, and what :class:`PreferenceTrainer` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ref_model: nn.Module | None = None,
        quantization_config: Any = None,
    ) -> None:
        if processing_class is not None and tokenizer is not None:
            raise SimpoError("tokenizer: the older name of processing_class; pass one of them")
        self._initialize(
            *(model, args, train_dataset, eval_dataset, processing_class or tokenizer, callbacks, optimizers),
            *(peft_config, ref_model),
            data_collator=data_collator,
            model_init=model_init,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=compute_metrics,
            quantization_config=quantization_config,
        )
        self._mean_chosen_length = torch.tensor(math.nan)  # in the current step

    # ---- the SFT term as a mean over tokens ----

    @property
    def _sft_weight(self) -> float:
        return 1.0 if self.objective.name == "orpo" else self.args.sft_weight

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in the base class, after computing the mean chosen length that the micro-batches need."""
        self._update_mean_length(inputs["micro_batches"])
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in the base class, after computing the mean chosen length that the micro-batches need."""
        self._update_mean_length(inputs["micro_batches"])
        return super().prediction_step(model, inputs, *args, **kwargs)

    def loss_and_metrics(
        self, y: Responses, batch: PlannedBatch, pair_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in the base class, with a pair's SFT term weighted by its chosen response's share of the step's tokens."""
        losses, metrics = super().loss_and_metrics(y, batch, pair_weights)
        if self._sft_weight:
            w = Responses(y.logp[batch.pairs.best], y.length[batch.pairs.best])
            share = w.length / self._mean_chosen_length  # 1 on average
            losses = losses + self._sft_weight * sft_term(w) * (share - 1)  # the base class has added it with weight 1
            metrics[:, 0] = losses.detach()
        return losses, metrics

    def _update_mean_length(self, batches: list[PlannedBatch]) -> None:
        """Compute the mean length of the chosen responses in the batches of all ranks."""
        if not self._sft_weight:
            return
        tokens = sum((batch.packed.lengths[batch.pairs.best] * batch.packed.weights).sum() for batch in batches)
        pairs = sum(batch.packed.weights.sum() for batch in batches)
        totals = self._sum_over_ranks(torch.stack([tokens, pairs]).to(self.args.device, torch.float32))
        self._mean_chosen_length = totals[0] / totals[1]
