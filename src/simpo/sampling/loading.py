"""Models for sampling: where they run, in which type, and how long a context they have."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from simpo.training.device import device, with_dtype
from simpo.training.limits import Limits
from simpo.training.model_arguments import ModelArguments
from simpo.training.models import below_adapter, generation_config, load_config, load_model


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is known of a model before its weights are read.

    Attributes:
        arguments: where it is, with the type of its weights chosen.
        limits: of what it can read.
        generation_config: its generation settings.
    """

    arguments: ModelArguments
    limits: Limits
    generation_config: GenerationConfig

    @property
    def context(self) -> int | None:
        """Positions that the model has; None if it has no bound."""
        return self.limits.positions

    @classmethod
    def read(cls, arguments: ModelArguments) -> Checkpoint:
        """Look at a model on disk or on the hub.

        Weights are bf16 on an accelerator and fp32 on a CPU unless ``dtype`` says otherwise.

        Raises:
            SimpoError: there is no such model.
        """
        config = load_config(arguments)
        base = below_adapter(arguments)
        found = generation_config(arguments.model_name_or_path, arguments.model_revision)
        found = found or generation_config(base.model_name_or_path, base.model_revision)
        return cls(
            with_dtype(arguments),
            Limits.of(config),
            found or GenerationConfig.from_model_config(config),  # a checkpoint need not have one
        )

    def load(self) -> PreTrainedModel:
        """The model, on the accelerator if there is one.

        Raises:
            SimpoError: it cannot be loaded.
        """
        model: Any = load_model(self.arguments.model_name_or_path, self.arguments)
        return model.to(device())
