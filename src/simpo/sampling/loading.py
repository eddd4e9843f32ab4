"""Models for sampling: where they run, in which type, and how long a context they have."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from simpo.errors import SimpoError
from simpo.training.models import ModelArguments, load_model


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is known of a model before its weights are read.

    Attributes:
        arguments: where it is, with the type of its weights chosen.
        context: positions that it has; None if it has no bound.
        generation_config: its generation settings.
    """

    arguments: ModelArguments
    context: int | None
    generation_config: GenerationConfig

    @classmethod
    def read(cls, arguments: ModelArguments) -> Checkpoint:
        """Look at a model on disk or on the hub.

        Weights are bf16 on an accelerator and fp32 on a CPU unless ``dtype`` says otherwise.

        Raises:
            SimpoError: there is no such model.
        """
        try:
            name, revision = _base(arguments)
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=arguments.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SimpoError(
                f"model_name_or_path: {arguments.model_name_or_path!r} cannot be loaded: {reason}"
            ) from error
        try:
            generation_config = GenerationConfig.from_pretrained(name, revision=revision)
        except OSError:  # a checkpoint need not have one
            generation_config = GenerationConfig.from_model_config(config)
        dtype = arguments.dtype or ("float32" if device().type == "cpu" else "bfloat16")
        return cls(dataclasses.replace(arguments, dtype=dtype), _context(config), generation_config)

    def load(self) -> PreTrainedModel:
        """The model, on the accelerator if there is one.

        Raises:
            SimpoError: it cannot be loaded.
        """
        model: Any = load_model(self.arguments.model_name_or_path, self.arguments)
        return model.to(device())


def device() -> torch.device:
    """Where models run: the accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _base(arguments: ModelArguments) -> tuple[str, str]:
    """Name and revision of the model whose configuration counts: of an adapter, its base model."""
    name, revision = arguments.model_name_or_path, arguments.model_revision
    if find_adapter_config_file(name, revision=revision) is None:
        return name, revision
    adapter = PeftConfig.from_pretrained(name, revision=revision)
    return adapter.base_model_name_or_path, adapter.revision or "main"


def _context(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
