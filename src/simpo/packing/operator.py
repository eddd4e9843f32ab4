"""Attention by segments as an operator of PyTorch, which ``torch.compile`` takes as it is.

Code is compiled again whenever a number that it has seen in Python changes, and every packed batch has other lengths.
An operator is not looked into, and its lengths come in integer tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simpo.packing.index import LayoutIndex
from simpo.packing.layout import AttentionLayout
from simpo.packing.segments import AttentionStyle, by_segment

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor[] index, float scale, int? window, float? softcap"
)


def by_segment_operator(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, style: AttentionStyle
) -> Tensor:
    """:func:`~simpo.packing.segments.by_segment`, without dropout, for compiled graphs.

    Backward computes the attention again: an operator cannot keep what PyTorch's own attention keeps for backward.
    """
    return _forward(query, key, value, style.sinks, list(layout.index), style.scale, style.window, style.softcap)


@torch.library.custom_op(
    "simpo::attention_by_segment",
    mutates_args=(),
    schema=f"({_INPUTS}) -> Tensor",
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    index: list[Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    layout = AttentionLayout.of_index(LayoutIndex(*index))
    return by_segment(query, key, value, layout, AttentionStyle(scale, window, softcap, sinks)).contiguous()


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op(
    "simpo::attention_by_segment_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> Tensor[]",
)
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    index: list[Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of query, key, value and, where there are some, sinks."""
    layout = AttentionLayout.of_index(LayoutIndex(*index))

    def attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        return by_segment(query, key, value, layout, AttentionStyle(scale, window, softcap, sinks))

    # not autograd.grad, which is switched off inside an operator
    _, pull = torch.func.vjp(attention, *_given(query, key, value, sinks))
    return [gradient.contiguous() for gradient in pull(grad)]


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *_: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in _given(query, key, value, sinks)]


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, sinks, index, *ctx.style = inputs
    ctx.save_for_backward(query, key, value, sinks, *index)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, sinks, *index = ctx.saved_tensors
    d_query, d_key, d_value, *d_sinks = _backward(grad, query, key, value, sinks, index, *ctx.style)
    return d_query, d_key, d_value, (d_sinks[0] if d_sinks else None), [None] * len(index), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
