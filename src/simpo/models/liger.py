"""``use_liger_kernel``: Liger's kernels for norms, rotary embeddings and gated layers, without its losses.

Liger's losses replace the model's forward, and the packed batches' own output layer needs as little memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from simpo.errors import SimpoError
from simpo.packing.model import causal_lm

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def layers_only(given: Mapping[str, bool] | None, device: torch.device) -> dict[str, bool]:
    """A ``liger_kernel_config`` with the losses off.

    Raises:
        SimpoError: Liger is not installed or does not run on ``device``, or a loss is asked for.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise SimpoError("use_liger_kernel: liger-kernel is not installed; install it, or leave the key out")
    if device.type not in ("cuda", "xpu", "npu") or importlib.util.find_spec("triton") is None:
        raise SimpoError(
            f"use_liger_kernel: Liger's kernels need a GPU and triton, and this run is on {device.type}; "
            "leave the key out"
        )
    if asked := [name for name in _LOSSES if (given or {}).get(name)]:
        raise SimpoError(
            f"liger_kernel_config: {asked[0]} is not supported (it replaces the model's forward; losses here have an "
            "output layer of their own that does not materialize logits); leave it out"
        )
    return {**(given or {}), **dict.fromkeys(_LOSSES, False)}


def check_layers(model: nn.Module, config: Mapping[str, bool]) -> None:
    """Refuse a model or kernels that Liger would pass over in silence.

    Raises:
        SimpoError: Liger has no kernels for this type of model, or none of a name in ``config``.
    """
    appliers = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    kind: Any = causal_lm(model).config.model_type
    if kind not in appliers:
        raise SimpoError(f"use_liger_kernel: liger-kernel has no kernels for model type {kind!r}; leave the key out")
    known = set(inspect.signature(appliers[kind]).parameters) - {"model"}
    if unknown := [name for name in config if name not in {*known, *_LOSSES}]:
        raise SimpoError(f"liger_kernel_config: {unknown[0]!r} is none of {', '.join(sorted(known - {*_LOSSES}))}")
