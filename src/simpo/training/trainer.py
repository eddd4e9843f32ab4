"""Preference training: the losses of pairs on packed batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from simpo.data.tokenize import Prepared, prepare
from simpo.errors import SimpoError
from simpo.objectives import Responses, sft_term
from simpo.training.batches import response_counts
from simpo.training.config import PreferenceConfig
from simpo.training.metrics import NAMES, pair_metrics
from simpo.training.packed import PackedTrainer


class PreferenceTrainer(PackedTrainer):
    """Trains a causal language model on preference pairs.

    A step's loss is the mean over its pairs. Arguments and errors are those of
    :class:`~simpo.training.packed.PackedTrainer`; ``args`` is a :data:`~simpo.training.config.PreferenceConfig`.
    """

    metric_names = NAMES

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: PreferenceConfig | None = None,  # type: ignore[valid-type]
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        config: Any = PreferenceConfig() if args is None else args
        self.row, self.hyperparameters = config.row, config.hyperparameters
        super().__init__(model, config, train_dataset, eval_dataset, processing_class, callbacks, optimizers)

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize pairs."""
        prepared = prepare(dataset, tokenizer, args.tokenize_settings, label=label)
        counts = response_counts(prepared.dataset)
        if (counts != 2).any():
            row = int(np.argmax(counts != 2))
            raise SimpoError(f"{label} row {row} has {counts[row]} responses; {args.objective!r} is trained on pairs")
        return prepared

    def row_figures(self, y: Responses) -> tuple[Tensor, Tensor]:
        """Losses, ``[C]``, and figures of ``C`` pairs; responses alternate between chosen and rejected."""
        w, l = Responses(y.logp[0::2], y.length[0::2]), Responses(y.logp[1::2], y.length[1::2])  # noqa: E741
        losses = self.row.loss(w, l, **self.hyperparameters)  # [C]
        if self.args.sft_weight:
            losses = losses + self.args.sft_weight * sft_term(w)
        return losses, pair_metrics(self.row, self.hyperparameters, losses, w, l)
