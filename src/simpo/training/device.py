"""Where models that are not trained run, and in which type."""

from __future__ import annotations

import dataclasses

import torch

from simpo.training.models import ModelArguments


def device() -> torch.device:
    """The accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def with_dtype(model: ModelArguments) -> ModelArguments:
    """The arguments with the type of the weights chosen: bf16 on an accelerator and fp32 on a CPU, unless given."""
    chosen = model.dtype or ("float32" if device().type == "cpu" else "bfloat16")
    return dataclasses.replace(model, dtype=chosen)
