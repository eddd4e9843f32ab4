"""The cost of running operations: live memory, floating-point operations, and bytes that are moved.

Works on real tensors and on fake ones (``torch._subclasses.FakeTensorMode``), which have shapes and no numbers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop

from simpo.packing.layout import PackedBatch

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
