"""The memory of optimizers: what they keep of each weight, and what they need at the peak of their step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from simpo.errors import SimpoError
from simpo.planning.model import StandIn
from simpo.planning.tracing import Tracer

# PyTorch's own optimizers, which make their step with fake tensors.
_TRACED: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw_torch": (torch.optim.AdamW, {}),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}
_BLOCK = 256  # weights that share an fp32 scale in 8-bit optimizers; 4-bit ones have half as many
_SMALLEST = 4096  # smaller tensors keep their states in 32 bits


def _full(states: int) -> Callable[[Tensor], float]:
    return lambda weight: 4.0 * states * weight.numel()


def _quantized(states: int, bits: int) -> Callable[[Tensor], float]:
    block = _BLOCK * bits // 8

    def stored(weight: Tensor) -> float:
        whole = weight.numel() < _SMALLEST or weight.numel() % block
        return states * weight.numel() * (4.0 if whole else bits / 8 + 4 / block)

    return stored


def _factored(weight: Tensor) -> float:
    """Adafactor: a mean square for every row and column."""
    rows = weight.numel() // weight.shape[-1] if weight.dim() > 1 else 0
    return 4.0 * (rows + weight.numel() // max(weight.shape[-2], 1)) if rows else 4.0 * weight.numel()


# What an optimizer keeps of a weight, in bytes, by transformers' names of optimizers.
_STORED: dict[str, Callable[[Tensor], float]] = {
    "adafactor": _factored,
    "adamw_torch_8bit": _quantized(2, 8),
    "adamw_torch_4bit": _quantized(2, 4),
    "adamw_bnb_8bit": _quantized(2, 8),
    "adamw_8bit": _quantized(2, 8),
    "ademamix": _full(3),
    "ademamix_8bit": _quantized(3, 8),
    "lion_32bit": _full(1),
    "lion_8bit": _quantized(1, 8),
    "rmsprop_bnb": _quantized(1, 8),
    "rmsprop_bnb_8bit": _quantized(1, 8),
    "rmsprop_bnb_32bit": _full(1),
    "schedule_free_adamw": _full(2),
    "schedule_free_radam": _full(2),
    "schedule_free_sgd": _full(1),
    "stable_adamw": lambda weight: 2.0 * weight.nbytes,
    "grokadamw": _full(3),
    "lomo": lambda weight: 0.0,
}
# Their states are in the host's memory where the GPU has no room.
_PAGED = {
    *("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit"),
}
_IN_32_BITS = {"adamw_bnb_8bit", "adamw_8bit"}  # of embeddings, as Trainer has it


def measure_update(stand_in: StandIn, name: str, *, cuda: bool) -> tuple[float, float]:
    """Bytes of the states of the optimizer ``name``, and what its step needs on top at its peak; called in a fake mode.

    Raises:
        SimpoError: the memory of this optimizer is not known.
    """
    if name in _TRACED:
        kind, options = _TRACED[name]
        if cuda and not options:
            options = {"foreach": True}  # PyTorch's choice on a GPU
        return _traced(stand_in.trained, lambda weights: kind(weights, lr=1e-6, **options))
    if name in _PAGED:
        return 0.0, 0.0
    stored = _STORED.get(name)
    if stored is None:
        known = ", ".join(sorted([*_TRACED, *_STORED, *_PAGED]))
        raise SimpoError(f"optim: the memory of {name!r} is not known to simpo plan; it knows {known}")
    embeddings = {id(m.weight) for m in stand_in.model.modules() if isinstance(m, nn.Embedding)}
    full = embeddings if name in _IN_32_BITS else set()
    states = sum(_full(2)(w) if id(w) in full else stored(w) for w in stand_in.trained)
    one_weight = max((4.0 * weight.numel() for weight in stand_in.trained), default=0.0)
    return states, one_weight * (name == "adafactor")


def _traced(weights: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple:
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    tracer = Tracer()
    with tracer:
        optimizer = make(weights)
        optimizer.step()
        states = tracer.live
        optimizer.step()  # states that the first step makes are there from then on
    return states, max(tracer.peaks.values()) - states
