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

from simpo.packing import kernels
from simpo.packing.attention import causal_lm
from simpo.packing.layout import LayoutIndex, PackedBatch
from simpo.packing.logprobs import ACCELERATOR_CHUNK, CPU_CHUNK
from simpo.packing.model import inside_forward, is_reward_model, rewards, token_logprobs
from simpo.packing.scoring import reference_states, token_outputs
from simpo.planning.model import Blueprint, StandIn
from simpo.planning.optimizers import measure_update
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
