"""Shared-prefix attention by its definition, one segment at a time: exact on every device and in every type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from simpo.packing.layout import AttentionLayout


@dataclass(frozen=True)
class AttentionStyle:
    """What a model's attention is beyond softmax(q k^T) v.

    Attributes:
        scale: factor on the scores.
        window: a query sees this many positions, its own included; None for all.
        softcap: bound of the scores, ``softcap * tanh(scores / softcap)``; None for none.
        sinks: ``[heads]`` logits that take part in the softmax and carry no value; None for none.
        dropout: probability of dropping an attention weight.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether ``scaled_dot_product_attention`` says it all."""
        return self.softcap is None and self.sinks is None


def by_segment(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, style: AttentionStyle) -> Tensor:
    """Attention over a packed batch, one call a segment.

    Args:
        query: ``[1, heads, T, D]``.
        key: ``[1, key-value heads, T, D]``.
        value: ``[1, key-value heads, T, D_v]``.
        layout: the comparisons' lengths.
        style: scale, window, softcap, sinks, dropout.

    Returns:
        ``[1, T, heads, D_v]``.
    """
    groups = query.shape[1] // key.shape[1]
    attend = _plain if style.plain else _special
    # split, not slices: its backward is one concatenation, where that of each slice would fill a whole [T]
    queries = iter(query.split(layout.query_sizes, dim=2))
    keys, values = iter(key.split(layout.part_sizes, dim=2)), iter(value.split(layout.part_sizes, dim=2))
    outputs = []
    for span in layout.spans:
        prompt_key, prompt_value = next(keys), next(values)
        for _ in span.responses:
            k = repeat_heads(torch.cat([prompt_key, next(keys)], dim=2), groups)
            v = repeat_heads(torch.cat([prompt_value, next(values)], dim=2), groups)
            outputs.append(attend(next(queries), k, v, style))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def repeat_heads(states: Tensor, groups: int) -> Tensor:
    """``[1, h, n, D]`` to ``[1, h * groups, n, D]``, each head repeated for its group of query heads."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """``[queries, keys]`` causal mask aligned bottom-right, with a sliding window where there is one."""
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)
    mask = column <= row
    return mask if window is None else mask & (column > row - window)


def _plain(q: Tensor, k: Tensor, v: Tensor, style: AttentionStyle) -> Tensor:
    """``[1, heads, queries, D_v]`` through PyTorch's own attention."""
    queries, keys = q.shape[2], k.shape[2]
    window = None if style.window is None or style.window >= keys else style.window
    triangle = window is None and queries == keys
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if triangle else _visible(queries, keys, window, q.device),
        dropout_p=style.dropout,
        is_causal=triangle,
        scale=style.scale,
    )


def _special(q: Tensor, k: Tensor, v: Tensor, style: AttentionStyle) -> Tensor:
    """``[1, heads, queries, D_v]`` with softcap and sinks, written out."""
    scores = (q @ k.transpose(-1, -2)) * style.scale  # [1, heads, queries, keys]
    if style.softcap is not None:
        scores = torch.tanh(scores / style.softcap) * style.softcap
    hidden = ~_visible(q.shape[2], k.shape[2], style.window, q.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    if style.sinks is not None:
        sinks = style.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=exact).to(v.dtype)[..., : k.shape[2]]
    return F.dropout(weights, style.dropout) @ v
