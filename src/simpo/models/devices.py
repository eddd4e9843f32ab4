"""Devices: which one a process computes on, what the processes of a run share, and kernels and compiled layers."""

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

_CPU_OUT_OF_MEMORY = "can't allocate memory"  # PyTorch's allocator raises an ordinary RuntimeError

# Liger's own losses replace the model's forward, and the output layer of packed batches needs as little memory.
_LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")

# Compiled graphs of one function: transformers' layers of all kinds share one, each with and without gradients.
_MOST_GRAPHS = 64


def device() -> torch.device:
    """The accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def free_memory() -> None:
    """Free the memory of models that are no longer needed; trainers and models hold references to one another."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def explain_oom(advise: Callable[[], str]) -> Iterator[None]:
    """If memory runs out, free it and raise :class:`SimpoError` with ``advise()`` instead of PyTorch's error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and _CPU_OUT_OF_MEMORY not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what had been computed
    else:
        return
    free_memory()
    raise SimpoError(advise()) from None


def from_main(value: Value, group: dist.ProcessGroup | None = None) -> Value:
    """The main process's ``value`` in every process; all have to call it. It can be any object that pickles."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group)
    return values[0]


def liger_config(config: Mapping[str, bool] | None, device: torch.device) -> dict[str, bool]:
    """A ``liger_kernel_config`` for norms, rotary embeddings and gated layers, with Liger's losses off."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise SimpoError("use_liger_kernel: liger-kernel is not installed; install it, or leave the key out")
    if device.type not in ("cuda", "xpu", "npu") or importlib.util.find_spec("triton") is None:
        raise SimpoError(
            f"use_liger_kernel: Liger's kernels need a GPU and triton, and this run is on {device.type}; "
            "leave the key out"
        )
    if requested := [name for name in _LIGER_LOSSES if (config or {}).get(name)]:
        raise SimpoError(
            f"liger_kernel_config: {requested[0]} is not supported (it replaces the model's forward; losses here have "
            "an output layer of their own that does not materialize logits); leave it out"
        )
    return {**(config or {}), **dict.fromkeys(_LIGER_LOSSES, False)}


def check_liger(model: nn.Module, config: Mapping[str, bool]) -> None:
    """Refuse a type of model, or names of kernels in ``config``, that Liger would silently ignore."""
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

    Layers of one kind share their compiled code, for any number of tokens. The rest of the forward looks at a batch's
    lengths in Python and would be compiled again for every batch. A model without layers of transformers' own kind is
    an error.
    """
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SimpoError(f"torch_compile: {type(model).__name__} has no layers that could be compiled; set it to false")
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        with third_party("torch_compile_backend, torch_compile_mode"):
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
