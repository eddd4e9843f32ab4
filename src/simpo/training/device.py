"""Where models that are not trained run, in which type, and what is left of their memory."""

from __future__ import annotations

import dataclasses
import gc

import torch

from simpo.training.model_arguments import ModelArguments


def device() -> torch.device:
    """The accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def with_dtype(model: ModelArguments) -> ModelArguments:
    """The arguments with the type of the weights chosen: bf16 on an accelerator and fp32 on a CPU, unless given."""
    chosen = model.dtype or ("float32" if device().type == "cpu" else "bfloat16")
    return dataclasses.replace(model, dtype=chosen)


def free_memory() -> None:
    """Of models that are not needed any more; trainers and models refer to one another."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
