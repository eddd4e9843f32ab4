"""The trainer behind the names of TRL and of the paper's code: their arguments, data and SFT term."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from datasets import Dataset, Value
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from simpo.compat.config import PortedConfig
from simpo.compat.models import model_for, tokenizer_of
from simpo.data.tokenize import Prepared
from simpo.errors import SimpoError
from simpo.objectives import Responses, sft_term
from simpo.training.batches import PlannedBatch
from simpo.training.trainer import PreferenceTrainer

_REFUSED = {
    "data_collator": "batches are packed, not padded, so there is nothing to collate",
    "model_init": "hyperparameter search is not supported; give model",
    "preprocess_logits_for_metrics": "no logits are made",
    "compute_metrics": "no logits are made; the trainer's score_rows gives the figures of every pair",
}


class PortedTrainer(PreferenceTrainer):
    """Takes what TRL's ``CPOTrainer`` and the paper's ``SimPOTrainer`` take, in their order.

    Args:
        model: a model, or the name or folder of one, then loaded with ``args.model_init_kwargs``.
        args: a ``config_class``.
        data_collator: refused.
        train_dataset: pairs. Strings are read as they are, conversations through the chat template.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer; the model's own if there is none.
        model_init: refused.
        callbacks: as for ``Trainer``.
        optimizers: as for ``Trainer``.
        preprocess_logits_for_metrics: refused.
        peft_config: an adapter to put on the model and train.
        compute_metrics: refused.
        tokenizer: the older name of ``processing_class``.

    The SFT term is the mean over the chosen responses' tokens of a step, so that a long response counts more.

    Raises:
        SimpoError: an argument that cannot be honoured, named, and what :class:`PreferenceTrainer` raises.
    """

    config_class: ClassVar[type[PortedConfig]]

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: PortedConfig | None = None,
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
    ) -> None:
        given = {
            "data_collator": data_collator,
            "model_init": model_init,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
            "compute_metrics": compute_metrics,
        }
        for name, value in given.items():
            if value is not None:
                raise SimpoError(f"{name}: not supported ({_REFUSED[name]})")
        if processing_class is not None and tokenizer is not None:
            raise SimpoError("tokenizer: the older name of processing_class; give one of them")
        config = self._checked(args)
        set_seed(config.seed)  # an adapter's first weights are drawn below
        model = model_for(model, config, peft_config)
        processing_class = processing_class or tokenizer or tokenizer_of(model, config)
        super().__init__(model, config, train_dataset, eval_dataset, processing_class, callbacks, optimizers)
        self._mean_chosen_length = torch.tensor(math.nan)  # of the step under way

    @classmethod
    def _checked(cls, args: Any) -> PortedConfig:
        args = cls.config_class() if args is None else args
        if not isinstance(args, cls.config_class):
            kind = f"{type(args).__module__}.{type(args).__qualname__}"
            raise SimpoError(f"args: a {kind}; import {cls.config_class.__name__} from simpo.compat")
        return args

    # ---- data ----

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize pairs; those made of strings without the chat template."""
        columns = getattr(dataset, "features", None) or {}
        if tokenizer is not None and tokenizer.chat_template and isinstance(columns.get("chosen"), Value):
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = None
        return super().prepare(dataset, tokenizer, args, label)

    # ---- the SFT term as a mean over tokens ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in the base, with the step's mean chosen length known to its micro-batches."""
        self._note_lengths(inputs["micro_batches"])
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in the base, with the element's mean chosen length known to its micro-batches."""
        self._note_lengths(inputs["micro_batches"])
        return super().prediction_step(model, inputs, *args, **kwargs)

    def row_figures(self, y: Responses, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """As in the base, with a pair's SFT term weighted by its chosen response's share of the step's tokens."""
        losses, figures = super().row_figures(y, batch)
        if self.args.sft_weight:
            w = Responses(y.logp[batch.pairs.best], y.length[batch.pairs.best])
            share = w.length / self._mean_chosen_length  # 1 on average
            losses = losses + self.args.sft_weight * sft_term(w) * (share - 1)  # the base has added it once
            figures[:, 0] = losses.detach()
        return losses, figures

    def _note_lengths(self, batches: list[PlannedBatch]) -> None:
        """Keep the mean length of the chosen responses in ``batches`` of all ranks."""
        if not self.args.sft_weight:
            return
        tokens = sum((batch.packed.lengths[batch.pairs.best] * batch.packed.weights).sum() for batch in batches)
        pairs = sum(batch.packed.weights.sum() for batch in batches)
        totals = self._sum_over_ranks(torch.stack([tokens, pairs]).to(self.args.device))
        self._mean_chosen_length = totals[0] / totals[1]
