"""The memory of an optimizer step: what a model, its gradients and its optimizer keep, and the peak on top of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from simpo.packing.selfcheck import Path
from simpo.planning.model import Blueprint, StandIn
from simpo.planning.optimizers import measure_update
from simpo.planning.tracing import Operation, Tracer


@dataclass(frozen=True)
class Setup:
    """How a step is computed.

    Attributes:
        optimizer: transformers' name of it.
        cuda: whether on a GPU, with its kernels.
        autocast: the type of products under autocast; None without.
        accumulates: whether gradients of an earlier micro-batch are there already.
        reference: whether a copy of the trained weights computes the reference in every forward.
        divergence: whether the KL divergence from it is part of the loss.
        share: of the gradients of layers that a process keeps: one over the number of processes that share them.
    """

    optimizer: str
    cuda: bool
    autocast: torch.dtype | None = None
    accumulates: bool = True
    reference: bool = False
    divergence: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Step:
    """What one micro-batch and the optimizer take, in bytes, before anything is shared out.

    Attributes:
        parameters: numbers that the model has.
        weights: of the model.
        gradients: of what is trained.
        states: of the optimizer.
        update: at the peak of the optimizer's step, on top of these three.
        copies: of the trained weights, as a reference.
        largest_layer: weights of the largest layer.
        outside_layers: weights of embeddings and output layer.
        peaks: of forward and backward on top of what is kept, by what computes.
        operations: of forward and backward, with how often they occur.
        path: the path that the model takes.
    """

    parameters: float
    weights: float
    gradients: float
    states: float
    update: float
    copies: float
    largest_layer: float
    outside_layers: float
    peaks: dict[str, float]
    operations: list[tuple[int, list[Operation]]]
    path: Path

    @property
    def peak(self) -> float:
        """At the peak of forward and backward, on top of what is kept."""
        return max(self.peaks.values())

    @property
    def flops(self) -> int:
        """Floating-point operations of forward and backward, counted as ``torch.utils.flop_counter`` does."""
        return sum(times * operation.flops for times, operations in self.operations for operation in operations)

    def extended(self, others: Sequence[tuple[Step, int]]) -> Step:
        """The step of a deeper model: each of ``others`` has one layer more, and occurs so many times."""

        def total(value: Callable[[Step], float]) -> float:
            return value(self) + sum(times * (value(other) - value(self)) for other, times in others)

        def deeper(name: str) -> float:
            return self.peaks[name] + sum(times * (other.peaks[name] - self.peaks[name]) for other, times in others)

        (_, own), *_ = self.operations
        return replace(
            self,
            parameters=total(lambda step: step.parameters),
            weights=total(lambda step: step.weights),
            gradients=total(lambda step: step.gradients),
            states=total(lambda step: step.states),
            update=total(lambda step: step.update),
            copies=total(lambda step: step.copies),
            peaks={name: deeper(name) for name in self.peaks},
            operations=[
                (1 - sum(times for _, times in others), own),
                *((times, other.operations[0][1]) for other, times in others),
            ],
        )


def measure_step(blueprint: Blueprint, batch: PackedBatch, setup: Setup) -> Step:
    """One micro-batch through a model of full depth, forward and backward, without computing any number of it.

    Memory grows by the same amount with every layer of a kind between the first and the last one: by activations that
    are kept while the last one computes, and by gradients that are there when the first one does.
    """
    kinds = blueprint.kinds()
    first = [numbers[0] for numbers in kinds]
    last = sorted(numbers[-1] for numbers in kinds if len(numbers) > 1)
    more = [
        (_trace(blueprint, [*first, numbers[1], *last], batch, setup), len(numbers) - 2)
        for numbers in kinds
        if len(numbers) > 2
    ]
    return _trace(blueprint, [*first, *last], batch, setup).extended(more)


def _trace(blueprint: Blueprint, layers: list[int], batch: PackedBatch, setup: Setup) -> Step:
    """The step of a model with these layers alone, in this order."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stand_in = blueprint.build(mode, layers)
    tracer = Tracer(sum(q * k for q, k in zip(batch.layout.query_sizes, batch.layout.key_sizes, strict=True)))
    with mode:
        fake = _fake(batch, kernels.varlen if setup.cuda else None)
        states, update = measure_update(stand_in, setup.optimizer, cuda=setup.cuda)
        for weight in stand_in.trained:
            weight.grad = torch.empty_like(weight) if setup.accumulates else None
        with tracer, _phases(stand_in, layers, tracer, setup.share):
            _forward_backward(stand_in, fake, tracer, setup)
    trained = float(sum(weight.nbytes for weight in stand_in.trained))
    return Step(
        parameters=sum(weight.numel() for weight in stand_in.model.parameters()),
        weights=stand_in.weights,
        gradients=trained,
        states=states,
        update=update,
        copies=trained if setup.reference or setup.divergence else 0.0,
        largest_layer=stand_in.largest_layer,
        outside_layers=stand_in.outside_layers,
        peaks=tracer.peaks,
        operations=[(1, tracer.operations)],
        path=stand_in.path,
    )


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
    """Inside, the phase of ``tracer`` says which layer computes, and in which direction.

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
        if reference is None:
            loss: Tensor = inside_forward(model, batch, compute, path=path).sum()
        else:
            found: Any = token_outputs(model, batch, reference=reference, path=path, chunk_bytes=chunk)
            loss = found.logps.sum() + found.divergence.sum()
    tracer.phase = "the rest of backward"
    loss.backward()
