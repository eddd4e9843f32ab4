"""Where a judging model runs, and in which type."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel

from simpo.training.models import ModelArguments


def with_dtype(model: ModelArguments) -> ModelArguments:
    """With the type of the weights chosen: bf16 on an accelerator and fp32 on a CPU unless ``dtype`` says otherwise."""
    return dataclasses.replace(model, dtype=model.dtype or ("float32" if _device().type == "cpu" else "bfloat16"))


def on_device(model: PreTrainedModel) -> Any:
    """The model, in evaluation mode, on the accelerator if there is one."""
    movable: Any = model
    return movable.to(_device()).eval()


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
