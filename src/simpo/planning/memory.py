"""The memory of an optimizer step: what a model, its gradients and its optimizer keep, and the peak on top of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simpo.errors import SimpoError
from simpo.packing import kernels
from simpo.packing.attention import causal_lm
from simpo.packing.layout import LayoutIndex, PackedBatch
from simpo.packing.logprobs import ACCELERATOR_CHUNK, CPU_CHUNK
from simpo.packing.model import inside_forward, is_reward_model, rewards, token_logprobs
from simpo.packing.scoring import reference_states, token_outputs
from simpo.planning.model import Blueprint, StandIn
from simpo.planning.tracing import Cost, Tracer, attended


@dataclass(frozen=True)
class Setup:
    """The setup of a step."""

    optimizer: str  # transformers' name of it
    cuda: bool  # whether on a GPU, with its kernels
    autocast: torch.dtype | None = None  # the type of products under autocast; None without
    accumulates: bool = True  # whether gradients of an earlier micro-batch are there already
    reference: bool = False  # whether a copy of the trained weights computes the reference in every forward
    divergence: bool = False  # whether the KL divergence from it is part of the loss
    pair_weights: bool = False  # whether pairs are weighed by the policy's probabilities
    # Of the gradients of layers that a process keeps: one over the number of processes that share them.
    share: float = 1.0


@dataclass(frozen=True)
class Kept:
    """Memory that stays allocated from step to step, in bytes, before anything is sharded."""

    parameters: float  # numbers that the model has
    weights: float  # of the model
    gradients: float  # of what is trained
    states: float  # of the optimizer
    update: float  # at the peak of the optimizer's step, on top of these three


@dataclass(frozen=True)
class Step:
    """Memory and cost of one micro-batch."""

    peaks: dict[str, float]  # bytes of forward and backward on top of what is kept, by what computes
    cost: Cost  # of forward and backward
    largest_layer: float  # bytes of the weights of the largest layer
    outside_layers: float  # bytes of the weights of embeddings and output layer

    @property
    def peak(self) -> float:
        """At the peak of forward and backward, on top of what is kept."""
        return max(self.peaks.values())


def measure_kept(blueprint: Blueprint, setup: Setup) -> Kept:
    """The memory that a model of full depth and its optimizer keep allocated."""

    def measure(layers: list[int]) -> dict[str, float]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        stand_in = blueprint.build(mode, layers)
        with mode:
            states, update = measure_update(stand_in, setup.optimizer, cuda=setup.cuda)
        return {
            "parameters": sum(weight.numel() for weight in stand_in.model.parameters()),
            "weights": stand_in.weights,
            "gradients": sum(weight.nbytes for weight in stand_in.trained),
            "states": states,
            "update": update,
        }

    return Kept(**_of_full_depth(blueprint, measure))


def measure_step(blueprint: Blueprint, batch: PackedBatch, setup: Setup) -> Step:
    """One micro-batch through a model of full depth, forward and backward, without computing any number of it."""
    sizes: dict[str, float] = {}

    def measure(layers: list[int]) -> dict[str, float]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        stand_in = blueprint.build(mode, layers)
        tracer = Tracer(attended(batch))
        with mode:
            fake = _fake(batch, kernels.varlen if setup.cuda else None)
            for weight in stand_in.trained:
                weight.grad = torch.empty_like(weight) if setup.accumulates else None
            with tracer, _phases(stand_in, layers, tracer, setup.share):
                _forward_backward(stand_in, fake, tracer, setup)
        sizes.update(largest_layer=stand_in.largest_layer, outside_layers=stand_in.outside_layers)
        return tracer.peaks | tracer.costs

    found = _of_full_depth(blueprint, measure)
    cost = Cost(**{field.name: found.pop(field.name) for field in fields(Cost)})
    return Step(peaks=found, cost=cost, **sizes)


def _of_full_depth(blueprint: Blueprint, measure: Callable[[list[int]], dict[str, float]]) -> dict[str, float]:
    """Extrapolate ``measure``, a function of the layers that a model has, to all layers.

    Between the first and the last layer of a kind, every additional layer adds the same memory: its activations
    are kept until the last layer has computed, and its gradients exist when backward reaches the first layer.
    """
    kinds = blueprint.kinds()
    first = [numbers[0] for numbers in kinds]
    last = sorted(numbers[-1] for numbers in kinds if len(numbers) > 1)
    few = measure([*first, *last])
    more = [(measure([*first, numbers[1], *last]), len(numbers) - 2) for numbers in kinds if len(numbers) > 2]
    return {name: size + sum(times * (one[name] - size) for one, times in more) for name, size in few.items()}


def _fake(batch: PackedBatch, kernel: kernels.Kernel | None) -> PackedBatch:
    """``batch`` with fake tensors, for attention by ``kernel``."""
    empty = torch.empty_like
    layout = batch.layout
    index = LayoutIndex(layout.index.sizes, *map(empty, layout.index[1:]))
    return replace(
        batch,
        layout=replace(layout, index=index, kernel=kernel),
        **{name: empty(getattr(batch, name)) for name in ("input_ids", "scored", "targets", "response_of", "lengths")},
    )


@contextmanager
def _phases(stand_in: StandIn, numbers: Sequence[int], tracer: Tracer, share: float) -> Iterator[None]:
    """A context in which the phase of ``tracer`` names the layer that computes, and the direction.

    Gradients of layers count as a ``share`` of their bytes once they are complete.
    """
    handles: list[Any] = []

    def enters(name: str, *_: Any) -> None:
        if tracer.phase != f"backward of {name}":  # a checkpointed layer that computes its activations again
            tracer.phase = f"forward of {name}"

    def leaves(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if tracer.phase == f"forward of {name}":
            tracer.phase = "the rest of forward"
            if states.requires_grad:
                states.register_hook(lambda _: setattr(tracer, "phase", f"backward of {name}"))

    for layer, number in zip(stand_in.layers, numbers, strict=True):
        name = f"layer {number}"
        handles.append(layer.register_forward_pre_hook(partial(enters, name)))
        handles.append(layer.register_forward_hook(partial(leaves, name)))
        for weight in layer.parameters():
            if weight.requires_grad and weight.grad is None:
                handles.append(weight.register_post_accumulate_grad_hook(lambda w: tracer.weigh(w.grad, share)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_backward(stand_in: StandIn, batch: PackedBatch, tracer: Tracer, setup: Setup) -> None:
    """One micro-batch as the trainers compute it; of the loss only what is as large as a batch."""
    model, path = stand_in.model, stand_in.path
    chunk = ACCELERATOR_CHUNK if setup.cuda else CPU_CHUNK
    compute: Any = rewards if is_reward_model(causal_lm(model)) else partial(token_logprobs, chunk_bytes=chunk)
    tracer.phase = "the rest of forward"
    reference = None
    with torch.autocast("cpu", setup.autocast, enabled=setup.autocast is not None):
        model.eval()
        with torch.no_grad():
            if setup.divergence:
                reference = reference_states(model, batch, path=path)
            if setup.reference:
                inside_forward(model, batch, compute, path=path)
        model.train()
        if reference is None and not setup.pair_weights:
            loss: Tensor = inside_forward(model, batch, compute, path=path).sum()
        else:
            given: Any = {"reference": reference, "log_collision": setup.pair_weights, "chunk_bytes": chunk}
            found = token_outputs(model, batch, path=path, **given)
            loss = found.logps.sum() + (0 if found.divergence is None else found.divergence.sum())
    tracer.phase = "the rest of backward"
    loss.backward()


# ---- Optimizers: what they keep of each weight, and what they need at the peak of their step.

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
