"""Preference training: the losses of pairs on packed batches."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simpo.data.tokenize import Prepared, prepare
from simpo.errors import SimpoError
from simpo.objectives import Objective, Responses, sft_term
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
    config_type = PreferenceConfig

    @cached_property
    def row(self) -> Objective:
        """The configured objective."""
        return self.args.row

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """Its hyperparameters, defaults filled in."""
        return self.args.hyperparameters

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
