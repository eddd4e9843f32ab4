"""Determines a model's compute dtype, and how large a difference rounding alone can explain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simpo.packing.attention import causal_lm


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of matrix products: autocast's, the weights', or the one that 4-bit weights are expanded to."""
    weight = next(model.parameters())
    if weight.dtype != torch.float32:
        return weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    expanded = (getattr(module, "compute_dtype", None) for module in model.modules())
    return next((dtype for dtype in expanded if dtype is not None), weight.dtype)


@contextmanager
def precision(device: torch.device, *, autocast: bool) -> Iterator[None]:
    """Compute matrix products in autocast's dtype inside this context, or in their inputs' dtype without ``autocast``.

    Without autocast, TF32 is off even if the run allows it (``tf32``, ``torch_compile``): with only three digits,
    rounding cannot be told from an error.
    """
    with torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), enabled=autocast):
        if autocast:
            yield
            return
        backends: Any = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
        default, previous = torch.backends.fp32_precision, [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, previous, strict=True):
                backend.fp32_precision = "none" if value == default else value  # "none" follows the default


def rounding_tolerance(rounding: float, dtype: torch.dtype) -> float:
    """Return the largest difference, in nats, between two ways of computing a log-probability that counts as rounding.

    Args:
        rounding: a measured difference that can only be due to rounding.
        dtype: dtype of the matrix products.
    """
    return max(16 * rounding, 64 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))


@contextmanager
def rounded_differently(model: nn.Module) -> Iterator[None]:
    """Perturb the output of every leaf module (linear layer, norm, ...) by at most one rounding error.

    Doing the same computations in a different order may change the model's outputs by as much.
    """
    unit = torch.finfo(compute_dtype(model)).eps / 2
    generators: dict[torch.device, torch.Generator] = {}

    def perturb(module: nn.Module, arguments: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        device = output.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
        noise = torch.rand(output.shape, generator=generator, device=device) * 2 - 1
        return (output * (1 + unit * noise)).to(output.dtype)

    inner = causal_lm(model)
    last = inner.get_output_embeddings()
    leaves = [module for module in inner.modules() if module is not last and not any(module.children())]
    handles = [module.register_forward_hook(perturb) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
