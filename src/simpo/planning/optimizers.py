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
# States of others by transformers' names: how many there are of each weight, and the bits of a number.
_STORED = {
    **{"adamw_torch_8bit": (2, 8), "adamw_torch_4bit": (2, 4), "adamw_bnb_8bit": (2, 8), "adamw_8bit": (2, 8)},
    **{"ademamix": (3, 32), "ademamix_8bit": (3, 8), "lion_32bit": (1, 32), "lion_8bit": (1, 8)},
    **{"rmsprop_bnb": (1, 8), "rmsprop_bnb_8bit": (1, 8), "rmsprop_bnb_32bit": (1, 32)},
    **{"schedule_free_adamw": (2, 32), "schedule_free_radam": (2, 32), "schedule_free_sgd": (1, 32)},
    **{"stable_adamw": (2, None), "grokadamw": (3, 32), "lomo": (0, 32)},  # None: as wide as the weight
}
# Their states are in the host's memory where the GPU has no room.
_PAGED = {
    *("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit"),
}
_SCALED = 256  # 8-bit numbers that share an fp32 scale; of 4-bit ones half as many
_SMALLEST = 4096  # smaller tensors keep their states in 32 bits
_IN_32_BITS = {"adamw_bnb_8bit", "adamw_8bit"}  # of embeddings, as Trainer has it


def measure_update(stand_in: StandIn, name: str, *, cuda: bool) -> tuple[float, float]:
    """Bytes of the states of the optimizer ``name``, and what its step needs on top at its peak; in a fake mode."""
    if name in _TRACED:
        kind, options = _TRACED[name]
        if cuda and not options:
            options = {"foreach": True}  # PyTorch's choice on a GPU
        return _traced(stand_in.trained, lambda weights: kind(weights, lr=1e-6, **options))
    if name in _PAGED:
        return 0.0, 0.0
    if name == "adafactor":
        largest = max((4.0 * weight.numel() for weight in stand_in.trained), default=0.0)
        return sum(map(_factored, stand_in.trained)), largest
    if name not in _STORED:
        known = ", ".join(sorted(["adafactor", *_TRACED, *_STORED, *_PAGED]))
        raise SimpoError(f"optim: the memory of {name!r} is not known to simpo plan; it knows {known}")
    states, bits = _STORED[name]
    embeddings = [m.weight for m in stand_in.model.modules() if isinstance(m, nn.Embedding)]
    full = {id(weight) for weight in embeddings} if name in _IN_32_BITS else set()
    return sum(states * _bytes(w, 32 if id(w) in full else bits) for w in stand_in.trained), 0.0


def _bytes(weight: Tensor, bits: int | None) -> float:
    """Bytes of one optimizer state of ``weight`` with this many bits per number, scales included."""
    if bits is None:
        return float(weight.nbytes)
    block = _SCALED * bits // 8
    if bits == 32 or weight.numel() < _SMALLEST or weight.numel() % block:
        return 4.0 * weight.numel()
    return weight.numel() * (bits / 8 + 4 / block)


def _factored(weight: Tensor) -> float:
    """Adafactor: a mean square for every row and column."""
    rows = weight.numel() // weight.shape[-1] if weight.dim() > 1 else 0
    return 4.0 * (rows + weight.numel() // max(weight.shape[-2], 1)) if rows else 4.0 * weight.numel()


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
