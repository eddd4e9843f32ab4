"""The memory and cost of an optimizer step: what stays allocated, the peak on top of that, and the operations."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop

from simpo.errors import SimpoError
from simpo.packing import attention
from simpo.packing.attention import causal_lm
from simpo.packing.layout import LayoutIndex, PackedBatch
from simpo.packing.logprobs import ACCELERATOR_CHUNK, CPU_CHUNK
from simpo.packing.model import inside_forward, is_reward_model, rewards, token_logprobs
from simpo.packing.scoring import reference_states, token_outputs
from simpo.planning.model import Blueprint, StandIn


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
            fake = _fake(batch, attention.varlen if setup.cuda else None)
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


def _fake(batch: PackedBatch, kernel: attention.Kernel | None) -> PackedBatch:
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


# ---- The cost of running operations, on real tensors and on fake ones, which have shapes and no numbers.

_aten = torch.ops.aten
# Operators that read as much as they write, however large their first input is.
_LOOKUPS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather, _aten.slice_backward}
_ATTENTION = ("attention", "attn")


@dataclass(frozen=True)
class Cost:
    """The cost of operations other than memory."""

    product: float = 0  # floating-point operations of matrix products, counted as `torch.utils.flop_counter` does
    # Floating-point operations of attention, counted in the same way, with what a causal mask hides.
    attention: float = 0
    moved: float = 0  # bytes read and written by all other operations
    operations: float = 0  # their number

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.product + self.attention


class Tracer(TorchDispatchMode):
    """Follows the storages that operations allocate inside it until they are freed, and counts the operations.

    Storages that existed before count as nothing.

    Args:
        pairs: pairs of query and key in one layer, for attention over sequences of different lengths, whose shapes do
            not show them.

    Attributes:
        phase: the name under which peaks are noted; set by whoever runs the operations.
        live: bytes that are allocated now.
        peaks: the most bytes that were allocated at a time, by phase.
        costs: the fields of :class:`Cost` for all operations.
    """

    def __init__(self, pairs: int = 0) -> None:
        super().__init__()
        self.pairs, self.phase, self.live = pairs, "", 0.0
        self.peaks: dict[str, float] = {}
        self.costs: Counter[str] = Counter()
        self._storages: dict[int, tuple[Any, list[float]]] = {}  # by address: a weak reference, and the bytes counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two thirds of all calls: reading an attribute of a fake tensor comes here too
        inputs = [leaf for leaf in arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._follow(tensor, counted=False)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [self._follow(tensor, counted=True) for tensor in outputs]
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), self.live)
        if any(new) or func._schema.is_mutable:  # not a view
            self._count(func, args, kwargs, inputs, outputs, result)
        return result

    def weigh(self, tensor: Tensor, factor: float) -> None:
        """Count ``tensor`` as ``factor`` of its bytes from now on, as if it were shared out."""
        _, counted = self._storages[tensor.untyped_storage()._cdata]
        change = tensor.untyped_storage().nbytes() * factor - counted[0]
        counted[0] += change
        self.live += change

    def _follow(self, tensor: Tensor, *, counted: bool) -> bool:
        """Whether the storage of ``tensor`` has not been seen before; it is followed from now on."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return False
        size = [float(storage.nbytes()) if counted else 0.0]

        def freed(_: Any) -> None:
            self.live -= size[0]
            self._storages.pop(address, None)

        self._storages[address] = (weakref.ref(storage, freed), size)
        self.live += size[0]
        return True

    def _count(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], result: Any
    ) -> None:
        packet, name = func._overloadpacket, func._schema.name
        self.costs["operations"] += 1
        if any(part in name for part in _ATTENTION):
            self.costs["attention"] += self._attention_flops(name, packet, args, kwargs, result)
        elif count := _PRODUCTS.get(packet) or flop_registry.get(packet):
            self.costs["product"] += count(*args, **kwargs, out_val=result)
        else:
            written = sum(tensor.nbytes for tensor in outputs)
            self.costs["moved"] += written + (
                written if packet in _LOOKUPS else sum(tensor.nbytes for tensor in inputs)
            )

    def _attention_flops(self, name: str, packet: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Two products of queries with keys in forward, and five in backward, one of them a repetition."""
        backward = "backward" in name
        if "varlen" in name:
            query = args[1] if backward else args[0]  # [T, heads, D]
            return (10 if backward else 4) * self.pairs * query.shape[1] * query.shape[2]
        if packet in flop_registry:
            return flop_registry[packet](*args, **kwargs, out_val=result)
        query, key, value = (tensor.shape for tensor in args[1 if backward else 0 :][:3])  # [rows, heads, tokens, D]
        flops = sdpa_flop(query, key, value)
        return flops * 5 // 2 if backward else flops


def attended(batch: PackedBatch) -> int:
    """Pairs of query and key in one layer."""
    return sum(q * k for q, k in zip(batch.layout.query_sizes, batch.layout.key_sizes, strict=True))


def _in_place_product(total: Tensor, left: Tensor, right: Tensor, **_: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


_PRODUCTS: dict[Any, Callable[..., int]] = {_aten.addmm_: _in_place_product}
