"""Chooses the device, frees memory, shares objects between processes, and sets up Liger kernels and compilation."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import distributed as dist
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from simpo.errors import SimpoError, third_party
from simpo.packing.model import causal_lm

Value = TypeVar("Value")

_CPU_OUT_OF_MEMORY = "can't allocate memory"  # PyTorch's CPU allocator raises an ordinary RuntimeError

# Liger's own losses replace the model's forward, and packed batches compute the output layer with as little memory.
_LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")

# Compiled graphs per function: all kinds of transformers layers share one function, each with and without gradients.
_MAX_GRAPHS = 64


def device() -> torch.device:
    """Return the accelerator, or the CPU if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def free_memory() -> None:
    """Free the memory of models that are no longer used; trainers and models form reference cycles."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def explain_oom(advise: Callable[[], str]) -> Iterator[None]:
    """Turn out-of-memory errors into a :class:`SimpoError` with ``advise()`` as its message, after freeing memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        recognized = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not recognized and _CPU_OUT_OF_MEMORY not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames hold tensors
    else:
        return
    free_memory()
    raise SimpoError(advise()) from None


def from_main(value: Value, group: dist.ProcessGroup | None = None) -> Value:
    """Return the main process's ``value``, any picklable object, in every process. Every process must call this."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group)
    return values[0]


def liger_config(config: Mapping[str, bool] | None, device: torch.device) -> dict[str, bool]:
    """Build a ``liger_kernel_config`` for norms, rotary embeddings and gated layers, without Liger's losses."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise SimpoError("use_liger_kernel: liger-kernel is not installed; install it, or leave the key out")
    if device.type not in ("cuda", "xpu", "npu") or importlib.util.find_spec("triton") is None:
        raise SimpoError(
            f"use_liger_kernel: Liger's kernels need a GPU and triton, and this run is on {device.type}; "
            "leave the key out"
        )
    if requested := [name for name in _LIGER_LOSSES if (config or {}).get(name)]:
        raise SimpoError(
            f"liger_kernel_config: {requested[0]} is not supported, because it replaces the model's forward; leave it "
            "out (losses are computed without materializing logits anyway)"
        )
    return {**(config or {}), **dict.fromkeys(_LIGER_LOSSES, False)}


def check_liger(model: nn.Module, config: Mapping[str, bool]) -> None:
    """Raise :class:`SimpoError` for a model type, or kernel names in ``config``, that Liger would silently ignore."""
    appliers = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    kind: Any = causal_lm(model).config.model_type
    if kind not in appliers:
        raise SimpoError(f"use_liger_kernel: liger-kernel has no kernels for model type {kind!r}; leave the key out")
    known = set(inspect.signature(appliers[kind]).parameters) - {"model"}
    if unknown := [name for name in config if name not in {*known, *_LIGER_LOSSES}]:
        raise SimpoError(
            f"liger_kernel_config: {unknown[0]!r} is not one of {', '.join(sorted(known - {*_LIGER_LOSSES}))}"
        )


def compile_layers(model: nn.Module, args: TrainingArguments, accelerator: Accelerator) -> None:
    """Compile the layers of ``model`` in place, and keep ``accelerator`` from compiling the whole model.

    Layers of the same kind share compiled code for any number of tokens. The rest of the forward reads a batch's
    lengths in Python and would be recompiled for every batch. A model without transformers' own layers is an error.
    """
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SimpoError(f"torch_compile: {type(model).__name__} has no layers that can be compiled; set it to false")
    torch._dynamo.config.recompile_limit = max(_MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        with third_party("torch_compile_backend, torch_compile_mode"):
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
