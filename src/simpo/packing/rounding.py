"""Rounding: the type that a model computes in, and the differences that rounding alone can explain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simpo.packing.attention import causal_lm


def computes_in(model: nn.Module) -> torch.dtype:
    """The type of matrix products: autocast's, the weights' own, or the type that 4-bit weights are expanded to."""
    weight = next(model.parameters())
    if weight.dtype != torch.float32:
        return weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    expanded = (getattr(module, "compute_dtype", None) for module in model.modules())
    return next((dtype for dtype in expanded if dtype is not None), weight.dtype)


@contextmanager
def precision(device: torch.device, *, autocast: bool) -> Iterator[None]:
    """A context in which products are computed in autocast's type, or without ``autocast`` in their inputs' type.

    Without autocast, fp32 is not rounded to TF32 even if the run allows it (``tf32``, ``torch_compile``): with three
    digits, rounding cannot be told from a mistake.
    """
    with torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), enabled=autocast):
        if autocast:
            yield
            return
        chosen: Any = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
        common, own = torch.backends.fp32_precision, [each.fp32_precision for each in chosen]
        try:
            for each in chosen:
                each.fp32_precision = "ieee"
            yield
        finally:
            for each, value in zip(chosen, own, strict=True):
                each.fp32_precision = "none" if value == common else value  # with "none", the common setting applies


def rounding_tolerance(rounding: float, dtype: torch.dtype) -> float:
    """Largest difference in nats, between two ways of computing a log-probability, that counts as rounding.

    Args:
        rounding: a difference that can only be rounding.
        dtype: of the matrix products.
    """
    return max(16 * rounding, 64 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))


@contextmanager
def rounded_differently(model: nn.Module) -> Iterator[None]:
    """Inside, the output of every innermost module (layer, norm, ...) changes by at most one rounding of its type.

    Any other order of the same computations may change the model's outputs as much as this does.
    """
    unit = torch.finfo(computes_in(model)).eps / 2
    generators: dict[torch.device, torch.Generator] = {}

    def change(module: nn.Module, arguments: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        device = output.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
        noise = torch.rand(output.shape, generator=generator, device=device) * 2 - 1
        return (output * (1 + unit * noise)).to(output.dtype)

    inner = causal_lm(model)
    last = inner.get_output_embeddings()
    innermost = [module for module in inner.modules() if module is not last and not any(module.children())]
    handles = [module.register_forward_hook(change) for module in innermost]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
