"""Measures an optimizer step on fake tensors: what stays allocated, the peak on top of that, and the operations."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_leaves
from torch.utils.flop_counter import flop_registry

from simpo.errors import SimpoError
from simpo.packing import attention
from simpo.packing.attention import causal_lm
from simpo.packing.layout import PackedBatch
from simpo.packing.logprobs import ACCELERATOR_CHUNK, CPU_CHUNK
from simpo.packing.model import inside_forward, is_reward_model, rewards, token_logprobs
from simpo.packing.scoring import reference_states, token_outputs
from simpo.planning.model import Blueprint, stored_bytes

# ---- What stays allocated from step to step.


@dataclass(frozen=True)
class ResidentMemory:
    """Memory that a model and its optimizer keep allocated, in bytes, before sharding."""

    parameters: int  # number of parameters, not bytes
    weights: float  # all weights
    gradients: float  # gradients of the trained weights
    states: float  # optimizer states
    update: float  # peak of the optimizer step, on top of these three
    largest_layer: float  # weights of the largest layer, in the dtype they compute in
    outside_layers: float  # weights outside the layers: embeddings and output layer


def measure_resident_memory(blueprint: Blueprint) -> ResidentMemory:
    """Measure the memory that the model of ``blueprint`` and its optimizer keep allocated."""
    model, layers = blueprint.build()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    states, update = optimizer_bytes(blueprint.optimizer, trained, embeddings, cuda=blueprint.cuda)
    layer_bytes = [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]
    return ResidentMemory(
        parameters=sum(weight.numel() for weight in model.parameters()),
        weights=stored_bytes(model, nested=blueprint.arguments.quantization.get("use_bnb_nested_quant", False)),
        gradients=sum(weight.nbytes for weight in trained),
        states=states,
        update=update,
        largest_layer=max(layer_bytes),
        outside_layers=sum(weight.nbytes for weight in model.parameters()) - sum(layer_bytes),
    )


# Optimizer states by transformers' names: how many per weight, and bits per number (None: as many as the weight has).
# Paged optimizers move their states to host memory when the GPU runs out.
_STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None), "adamw_torch_fused": (2, None), "stable_adamw": (2, None),
    "sgd": (0, None), "adagrad": (1, None), "rmsprop": (1, None), "lomo": (0, None),
    "adamw_torch_8bit": (2, 8), "adamw_torch_4bit": (2, 4), "adamw_bnb_8bit": (2, 8), "adamw_8bit": (2, 8),
    "ademamix": (3, 32), "ademamix_8bit": (3, 8), "lion_32bit": (1, 32), "lion_8bit": (1, 8),
    "rmsprop_bnb": (1, 8), "rmsprop_bnb_8bit": (1, 8), "rmsprop_bnb_32bit": (1, 32), "grokadamw": (3, 32),
    "schedule_free_adamw": (2, 32), "schedule_free_radam": (2, 32), "schedule_free_sgd": (1, 32),
    **{f"paged_{name}_{bits}bit": (0, bits) for name in ("adamw", "ademamix", "lion") for bits in (8, 32)},
}  # fmt: skip
# Temporary tensors of PyTorch's optimizers: (number on a GPU, each as large as all weights together; number elsewhere,
# each as large as the largest weight).
_TEMPORARY = {"adamw_torch": (1, 2), "adagrad": (2, 1), "rmsprop": (1, 1)}
_BLOCK = 256  # how many 8-bit numbers share an fp32 scale; half as many 4-bit numbers do
_MIN_QUANTIZED = 4096  # smaller tensors keep their states in 32 bits
_FP32_EMBEDDING_STATES = {"adamw_bnb_8bit", "adamw_8bit"}  # Trainer keeps embedding states in 32 bits with these


def optimizer_bytes(
    name: str, trained: Sequence[Tensor], embeddings: Sequence[Tensor], *, cuda: bool
) -> tuple[float, float]:
    """Return the bytes of the states of optimizer ``name``, and what its step allocates on top of that at its peak."""
    if name == "adafactor":  # in fp32: a mean square per row and column, and temporary copies of one weight
        copies = ((2 if weight.dtype == torch.float32 else 4) * 4.0 * weight.numel() for weight in trained)
        return sum(map(_factored, trained)), max(copies, default=0.0)
    if name not in _STATES:
        known = ", ".join(sorted(["adafactor", *_STATES]))
        raise SimpoError(f"optim: simpo plan does not know how much memory {name!r} needs; it knows {known}")
    count, bits = _STATES[name]
    full = {id(weight) for weight in embeddings} if name in _FP32_EMBEDDING_STATES else set()
    states = sum(count * _bytes(weight, 32 if id(weight) in full else bits) for weight in trained)
    together, alone = _TEMPORARY.get(name, (0, 0))
    sizes = [weight.nbytes for weight in trained]
    return states, float(together * sum(sizes) if cuda else alone * max(sizes, default=0))


def _bytes(weight: Tensor, bits: int | None) -> float:
    """Return the bytes of one optimizer state of ``weight`` with this many bits per number, including scales."""
    if bits is None:
        return float(weight.nbytes)
    block = _BLOCK * bits // 8
    if bits == 32 or weight.numel() < _MIN_QUANTIZED or weight.numel() % block:
        return 4.0 * weight.numel()
    return weight.numel() * (bits / 8 + 4 / block)


def _factored(weight: Tensor) -> float:
    """Return the bytes of Adafactor's states of ``weight``."""
    size = weight.numel()
    return 4.0 * (size if weight.dim() < 2 else size // weight.shape[-1] + size // weight.shape[-2])


# ---- One micro-batch, forward and backward.

_OTHER_FORWARD = "the rest of the forward pass"


@dataclass(frozen=True)
class Cost:
    """The cost of operations, apart from memory."""

    product: float = 0  # FLOPs of matrix products, counted as `torch.utils.flop_counter` does
    attention: float = 0  # FLOPs of attention, counted in the same way, including masked scores
    moved: float = 0  # bytes read and written by all other operations
    operations: float = 0  # number of operations of all kinds

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.product + self.attention


@dataclass(frozen=True)
class Step:
    """Memory and cost of one micro-batch."""

    peaks: dict[str, float]  # peak bytes of forward and backward on top of resident memory, by phase
    cost: Cost  # cost of forward and backward

    @property
    def peak_phase(self) -> str:
        """The phase in which memory use peaks."""
        return max(self.peaks, key=lambda name: self.peaks[name])


def measure_step(blueprint: Blueprint, batch: PackedBatch) -> Step:
    """Trace forward and backward of one micro-batch through a model of full depth, without computing any values.

    Only a few layers run. Between the first and the last layer of a kind, each additional layer adds the same memory:
    its activations are kept until the last layer has run, and its gradients exist when backward reaches the first.

    Where checkpointing recomputes comparisons instead of layers, only the heaviest comparison runs. Each other one adds
    the same number of operations, their arithmetic in proportion to its tokens, and memory to that of its responses.
    """
    costs = [field.name for field in fields(Cost)]
    others: dict[str, float] = {}  # what the other comparisons add, as multiples of what the heaviest one adds
    if blueprint.recomputes_comparisons():
        if blueprint.sharded:  # one checkpoint for the whole micro-batch, so all activations exist during the backward
            step = measure_step(replace(blueprint, checkpointed_share=0.0), batch)
            return Step(step.peaks, Cost(*(value * 4 / 3 for value in astuple(step.cost))))  # with a second forward
        comparisons = batch.comparisons
        alone = PackedBatch.build([max(comparisons, key=lambda comparison: comparison.packed_length)])
        others = dict.fromkeys(costs, batch.tokens / alone.tokens - 1) | {"operations": len(comparisons) - 1}
        responses = sum(len(ids) for comparison in comparisons for ids in comparison.response_ids)
        batch = alone
    kinds = blueprint.layer_groups()
    first = [numbers[0] for numbers in kinds]
    last = sorted(numbers[-1] for numbers in kinds if len(numbers) > 1)
    few = _trace(blueprint, batch, [*first, *last])
    total = dict(few)
    if others:
        two = _trace(blueprint, PackedBatch.build(2 * batch.comparisons), [*first, *last])
        for name, size in few.items():
            total[name] += others.get(name, responses / len(batch.scored) - 1) * (two[name] - size)
    for numbers in kinds:
        if len(numbers) > 2:
            one_more = _trace(blueprint, batch, [*first, numbers[1], *last])
            for name, size in few.items():
                total[name] += (1 + others.get(name, 0)) * (len(numbers) - 2) * (one_more[name] - size)
    return Step(cost=Cost(**{name: total.pop(name) for name in costs}), peaks=total)


def check_forward(blueprint: Blueprint, batch: PackedBatch) -> None:
    """Run the first layer of each kind on fake tensors, and raise whatever the model raises."""
    _trace(blueprint, batch, [numbers[0] for numbers in blueprint.layer_groups()])


def _trace(blueprint: Blueprint, batch: PackedBatch, numbers: Sequence[int]) -> dict[str, float]:
    """Trace a micro-batch through these layers alone, and return its peaks and costs."""
    model, layers = blueprint.build(numbers)
    tracer = Tracer(attended(batch))
    for layer, number in zip(layers, numbers, strict=True):
        _name_phases(layer, number, tracer)

    def shard_gradient(weight: Tensor) -> None:
        tracer.live += weight.grad.nbytes * blueprint.share  # type: ignore[union-attr]
        weight.grad = None

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        for weight in model.parameters():
            if weight.requires_grad and blueprint.accumulates:
                weight.grad = torch.empty_like(weight)
        if blueprint.share < 1 and not blueprint.accumulates:
            for weight in nn.ModuleList(layers).parameters():
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(shard_gradient)
        with tracer:
            _forward_backward(model, batch, tracer, blueprint)
    return tracer.peaks | tracer.costs


def _name_phases(layer: nn.Module, number: int, tracer: Tracer) -> None:
    """Make ``tracer.phase`` name the layer that is running, and whether it runs forward or backward."""
    forward, backward = f"forward of layer {number}", f"backward of layer {number}"

    def before_forward(*_: Any) -> None:
        if tracer.phase != backward:  # otherwise a checkpointed layer is recomputing its activations
            tracer.phase = forward

    def after_forward(_: Any, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if tracer.phase == forward:
            tracer.phase = _OTHER_FORWARD
            if states.requires_grad:
                states.register_hook(lambda _: setattr(tracer, "phase", backward))

    layer.register_forward_pre_hook(before_forward)
    layer.register_forward_hook(after_forward)


def _forward_backward(model: Any, batch: PackedBatch, tracer: Tracer, blueprint: Blueprint) -> None:
    """Run one micro-batch as the trainers do, with only those parts of the loss that scale with the batch."""
    if blueprint.cuda:
        batch = replace(batch, layout=replace(batch.layout, kernel=attention.varlen))
    chunk = ACCELERATOR_CHUNK if blueprint.cuda else CPU_CHUNK
    compute: Any = rewards if is_reward_model(causal_lm(model)) else partial(token_logprobs, chunk_bytes=chunk)
    tracer.phase = _OTHER_FORWARD
    reference = None
    with torch.autocast("cpu", blueprint.autocast, enabled=blueprint.autocast is not None):
        model.eval()
        with torch.no_grad():
            if blueprint.divergence:
                reference = reference_states(model, batch)
            if blueprint.reference:
                inside_forward(model, batch, compute)
        model.train()
        if reference is None and not blueprint.pair_weights:
            loss: Tensor = inside_forward(model, batch, compute).sum()
        else:
            options: Any = {"reference": reference, "log_collision": blueprint.pair_weights, "chunk_bytes": chunk}
            outputs = token_outputs(model, batch, **options)
            loss = outputs.logps.sum() + (0 if outputs.divergence is None else outputs.divergence.sum())
    tracer.phase = "the rest of the backward pass"
    loss.backward()


# ---- Tracing operations, on real tensors and on fake ones, which have shapes but no values.

_aten = torch.ops.aten
# Operators that read only as much as they write, however large their first input is.
_LOOKUPS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather, _aten.slice_backward}
_PRODUCTS = {
    **flop_registry,
    _aten.addmm_: lambda total, left, right, **_: 2 * left.shape[0] * left.shape[1] * right.shape[1],
}


class Tracer(TorchDispatchMode):
    """Tracks the storages that operations allocate in this context until they are freed, and counts the operations.

    Storages that existed before do not count.

    Args:
        pairs: query-key pairs in one layer, for variable-length attention, whose shapes do not reveal them.

    Attributes:
        phase: name under which peaks are recorded; set it while running operations.
        live: bytes allocated now.
        peaks: largest number of bytes allocated at a time, by phase.
        costs: the fields of :class:`Cost`, summed over all operations.
    """

    def __init__(self, pairs: int = 0) -> None:
        super().__init__()
        self.pairs, self.phase, self.live = pairs, "", 0.0
        self.peaks: dict[str, float] = {}
        self.costs: Counter[str] = Counter({field.name: 0 for field in fields(Cost)})
        self._storages: dict[int, Any] = {}  # weak references, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a shortcut for two thirds of all calls: reading a fake tensor's device
        inputs = [leaf for leaf in arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._track(tensor, counted=False)
        if inputs and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            with unset_fake_temporarily():  # operations on a batch's index, whose values determine shapes
                result = func(*args, **kwargs)
        elif func is _aten._grouped_mm.default:  # PyTorch infers its shape only in bf16
            left, right, *others = args
            result = func(left.bfloat16(), right.bfloat16(), *others, **kwargs).to(left.dtype)
        else:
            result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [self._track(tensor, counted=True) for tensor in outputs]
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), self.live)
        if any(new) or func._schema.is_mutable:  # not a view
            self.costs["operations"] += 1
            if any(part in func._schema.name for part in ("attention", "attn")):
                self.costs["attention"] += self._attention_flops(func._schema.name, args)
            elif count := _PRODUCTS.get(func._overloadpacket):
                self.costs["product"] += count(*args, **kwargs, out_val=result)
            else:
                read = outputs if func._overloadpacket in _LOOKUPS else inputs
                self.costs["moved"] += sum(tensor.nbytes for tensor in (*outputs, *read))
        return result

    def _track(self, tensor: Tensor, *, counted: bool) -> bool:
        """Start tracking the storage of ``tensor``, and return whether it is new."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes() if counted else 0
        if address in self._storages:
            return False

        def freed(_: Any) -> None:
            self.live -= size
            self._storages.pop(address, None)

        self._storages[address] = weakref.ref(storage, freed)
        self.live += size
        return True

    def _attention_flops(self, name: str, args: Any) -> int:
        """Return the FLOPs of attention: two matrix products in forward, five (one recomputed) in backward."""
        backward = "backward" in name
        query, key, value = args[1:4] if backward else args[:3]  # [T, heads, D] or [rows, heads, tokens, D]
        scores = self.pairs * query.shape[1] if "varlen" in name else query.shape[:-1].numel() * key.shape[-2]
        width, value_width = query.shape[-1], value.shape[-1]
        return 2 * scores * (3 * width + 2 * value_width if backward else width + value_width)


def attended(batch: PackedBatch) -> int:
    """Return the number of query-key pairs in one layer."""
    return sum(q * k for q, k in zip(batch.layout.query_sizes, batch.layout.key_sizes, strict=True))
