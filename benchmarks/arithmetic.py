"""FLOP counts for an optimizer step: the floating-point operations of its matrix products.

A product of ``[m, k]`` and ``[k, n]`` counts ``2 m k n``, and backward adds two products of the same size for each one
in forward. Attention counts every query-key pair, even those hidden by a causal mask, as ``torch.utils.flop_counter``
does. Embedding lookups, norms, rotations, activations, softmax and the optimizer count as zero, so the ratio of two
counts bounds the ratio of two speeds only if both sides run their products equally fast. :func:`necessary_flops` is
stricter and leaves out the pairs that a causal mask hides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from simpo.packing.layout import TokenizedComparison


class Product(NamedTuple):
    """``count`` batched matrix products of ``[batch, m, k]`` and ``[batch, k, n]``."""

    m: int
    k: int
    n: int
    batch: int = 1
    count: int = 1

    @property
    def flops(self) -> int:
        """Floating-point operations of all ``count`` products."""
        return 2 * self.m * self.k * self.n * self.batch * self.count


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama-like model that determine its FLOPs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the dimensions from a transformers configuration."""
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
    """The work done by one forward pass.

    Attributes:
        tokens: positions that go through the layers, padding included.
        segments: ``(rows, queries, keys)`` of every attention call.
        scored: positions whose logits are computed.
        recomputed: positions whose logits are recomputed in backward.
    """

    tokens: int
    segments: tuple[tuple[int, int, int], ...]
    scored: int
    recomputed: int = 0

    def layer_products(self, shape: Shape) -> Iterator[Product]:
        """Yield the forward products with the layer weights."""
        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        yield Product(self.tokens, shape.hidden, queries, count=shape.layers)
        yield Product(self.tokens, shape.hidden, keys, count=2 * shape.layers)
        yield Product(self.tokens, queries, shape.hidden, count=shape.layers)
        yield Product(self.tokens, shape.hidden, shape.intermediate, count=2 * shape.layers)
        yield Product(self.tokens, shape.intermediate, shape.hidden, count=shape.layers)

    def attention_products(self, shape: Shape) -> Iterator[Product]:
        """Yield the forward products of attention: queries with keys, and weights with values."""
        for rows, queries, keys in self.segments:
            yield Product(queries, shape.head_size, keys, rows * shape.heads, shape.layers)
            yield Product(queries, keys, shape.head_size, rows * shape.heads, shape.layers)

    def head_product(self, shape: Shape) -> Product:
        """Return the forward product with the output layer."""
        return Product(self.scored, shape.hidden, shape.vocabulary)

    def products(self, shape: Shape) -> Iterator[Product]:
        """Yield all products of forward and backward."""
        head = self.head_product(shape)
        for product in (*self.layer_products(shape), *self.attention_products(shape), head):
            yield product
            yield from backward_of(product)
        yield head._replace(m=self.recomputed)

    def flops(self, shape: Shape) -> int:
        """Return the floating-point operations of forward and backward."""
        return sum(product.flops for product in self.products(shape))

    def visible_flops(self, shape: Shape) -> int:
        """Return the same count with only the query-key pairs that the causal mask leaves visible."""
        unmasked = sum(3 * product.flops for product in self.attention_products(shape))
        pairs = sum(rows * queries * (2 * keys - queries + 1) // 2 for rows, queries, keys in self.segments)
        return self.flops(shape) - unmasked + 3 * 4 * pairs * shape.heads * shape.head_size * shape.layers


def backward_of(product: Product) -> tuple[Product, Product]:
    """Return the two backward products, one for the gradient of each factor."""
    m, k, n, batch, count = product
    return Product(m, n, k, batch, count), Product(k, m, n, batch, count)


def packed_forward(comparisons: Sequence[TokenizedComparison], *, chunk_rows: int | None = None) -> Forward:
    """Count a packed micro-batch: every token once, and logits at the scored positions only.

    Args:
        comparisons: the comparisons in the micro-batch.
        chunk_rows: maximum number of logit rows per chunk, or None for a single chunk. The last chunk is kept for
            backward; the others are recomputed.
    """
    segments = []
    for comparison in comparisons:  # the first response is in the same causal segment as the prompt
        prompt, (first, *others) = len(comparison.prompt_ids), map(len, comparison.response_ids)
        segments.append((1, prompt + first, prompt + first))
        segments += [(1, other, prompt + other) for other in others]
    scored = sum(len(ids) for c in comparisons for ids in c.response_ids)
    return Forward(
        tokens=sum(c.packed_length for c in comparisons),
        segments=tuple(segments),
        scored=scored,
        recomputed=_recomputed_rows(scored, chunk_rows),
    )


def padded_forward(
    comparisons: Sequence[TokenizedComparison], *, all_logits: bool, chunk_rows: int | None = None
) -> Forward:
    """Count a padded micro-batch: one row of prompt and response per response; logits at all or scored positions."""
    rows = sum(len(c.response_ids) for c in comparisons)
    width = max(len(c.prompt_ids) + len(ids) for c in comparisons for ids in c.response_ids)
    scored = sum(len(ids) for c in comparisons for ids in c.response_ids)
    return Forward(
        tokens=rows * width,
        segments=((rows, width, width),),
        scored=rows * width if all_logits else scored,
        recomputed=0 if all_logits else _recomputed_rows(scored, chunk_rows),
    )


def _recomputed_rows(scored: int, chunk_rows: int | None) -> int:
    """Return the rows in all chunks but the last, for equal chunks of at most ``chunk_rows`` (0: everything)."""
    if chunk_rows is None or scored <= chunk_rows:
        return 0
    if not chunk_rows:
        return scored
    chunks = -(-scored // chunk_rows)
    return (chunks - 1) * -(-scored // chunks)


def necessary_flops(comparisons: Sequence[TokenizedComparison], shape: Shape) -> int:
    """Return the FLOPs that any training on ``comparisons`` needs, the numerator of model FLOPs utilization.

    Counts unique tokens, visible query-key pairs and the logits of scored tokens, each once.
    """
    return packed_forward(comparisons).visible_flops(shape)
