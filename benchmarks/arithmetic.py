"""Counted arithmetic of an optimizer step: the floating-point operations that its matrix products need.

A product of ``[m, k]`` and ``[k, n]`` counts ``2 m k n``. Backward makes two products of the same size for every one of
forward. Attention counts every query with every key of its call, as ``torch.utils.flop_counter`` does, also where a
causal mask hides half of them. Embedding look-ups, norms, rotations, activations, softmax and the optimizer count
nothing, so the ratio of two counts bounds the ratio of two speeds only as far as both sides reach the same speed in
their products. :func:`necessary_flops` is stricter: what a causal mask hides counts nothing either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from simpo.packing.layout import TokenizedComparison


class Product(NamedTuple):
    """``count`` matrix products of ``[m, k]`` and ``[k, n]``, for each of ``batch`` matrices at once."""

    m: int
    k: int
    n: int
    batch: int = 1
    count: int = 1

    @property
    def flops(self) -> int:
        """Floating-point operations of all of them."""
        return 2 * self.m * self.k * self.n * self.batch * self.count


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model that matter to its arithmetic."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a configuration of transformers."""
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class Forward:
    """What one forward computes.

    Attributes:
        tokens: rows that go through the layers, padding included.
        segments: ``(rows, queries, keys)`` of every attention call.
        scored: positions whose logits are made.
        recomputed: positions whose logits backward makes again.
    """

    tokens: int
    segments: tuple[tuple[int, int, int], ...]
    scored: int
    recomputed: int = 0

    def layer_products(self, shape: Shape) -> Iterator[Product]:
        """Forward's products with the weights of the layers."""
        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        yield Product(self.tokens, shape.hidden, queries, count=shape.layers)
        yield Product(self.tokens, shape.hidden, keys, count=2 * shape.layers)
        yield Product(self.tokens, queries, shape.hidden, count=shape.layers)
        yield Product(self.tokens, shape.hidden, shape.intermediate, count=2 * shape.layers)
        yield Product(self.tokens, shape.intermediate, shape.hidden, count=shape.layers)

    def attention_products(self, shape: Shape) -> Iterator[Product]:
        """Forward's products of queries with keys and of weights with values."""
        for rows, queries, keys in self.segments:
            yield Product(queries, shape.head_size, keys, rows * shape.heads, shape.layers)
            yield Product(queries, keys, shape.head_size, rows * shape.heads, shape.layers)

    def head_product(self, shape: Shape) -> Product:
        """Forward's product with the output layer."""
        return Product(self.scored, shape.hidden, shape.vocabulary)

    def products(self, shape: Shape) -> Iterator[Product]:
        """All products of forward and backward."""
        head = self.head_product(shape)
        for product in (*self.layer_products(shape), *self.attention_products(shape), head):
            yield product
            yield from backward_of(product)
        yield head._replace(m=self.recomputed)

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of forward and backward."""
        return sum(product.flops for product in self.products(shape))

    def visible_flops(self, shape: Shape) -> int:
        """The same, attention counted over the pairs of query and key that the causal mask leaves."""
        every = sum(3 * product.flops for product in self.attention_products(shape))
        pairs = sum(rows * queries * (2 * keys - queries + 1) // 2 for rows, queries, keys in self.segments)
        return self.flops(shape) - every + 3 * 4 * pairs * shape.heads * shape.head_size * shape.layers


def backward_of(product: Product) -> tuple[Product, Product]:
    """The gradients of both factors."""
    m, k, n, batch, count = product
    return Product(m, n, k, batch, count), Product(k, m, n, batch, count)


def packed_forward(comparisons: Sequence[TokenizedComparison], *, kept_rows: int | None = None) -> Forward:
    """Every token once, logits at the scored positions only.

    Args:
        comparisons: those of the micro-batch.
        kept_rows: rows of logits of a chunk at most, the last of which is kept for backward. None: no limit.
    """
    segments = []
    for comparison in comparisons:
        prompt, (first, *others) = len(comparison.prompt_ids), map(len, comparison.response_ids)
        segments.append((1, prompt + first, prompt + first))
        segments += [(1, other, prompt + other) for other in others]
    scored = sum(len(ids) for c in comparisons for ids in c.response_ids)
    return Forward(
        tokens=sum(c.packed_length for c in comparisons),
        segments=tuple(segments),
        scored=scored,
        recomputed=_made_again(scored, kept_rows),
    )


def padded_forward(
    comparisons: Sequence[TokenizedComparison], *, all_logits: bool, kept_rows: int | None = None
) -> Forward:
    """Every response as a row with its prompt, padded to the longest; logits everywhere or at scored positions."""
    rows = sum(len(c.response_ids) for c in comparisons)
    width = max(len(c.prompt_ids) + len(ids) for c in comparisons for ids in c.response_ids)
    scored = sum(len(ids) for c in comparisons for ids in c.response_ids)
    return Forward(
        tokens=rows * width,
        segments=((rows, width, width),),
        scored=rows * width if all_logits else scored,
        recomputed=0 if all_logits else _made_again(scored, kept_rows),
    )


def _made_again(scored: int, kept_rows: int | None) -> int:
    """Rows of all chunks but the last, where chunks are alike and have at most ``kept_rows``."""
    if kept_rows is None or scored <= kept_rows:
        return 0
    if not kept_rows:
        return scored
    chunks = -(-scored // kept_rows)
    return (chunks - 1) * -(-scored // chunks)


def necessary_flops(comparisons: Sequence[TokenizedComparison], shape: Shape) -> int:
    """What training on ``comparisons`` cannot do without: unique tokens, visible pairs, logits of scored tokens, once.

    The numerator of model-FLOPs utilisation.
    """
    return packed_forward(comparisons).visible_flops(shape)
