"""Shared-prefix attention: registration with transformers, and the operator that compiled layers contain.

Registered with transformers' attention and mask interfaces. The layout arrives as a forward keyword argument, because a
side channel would be gone when gradient checkpointing recomputes a layer. A call without a layout goes to the
implementation that the model had before, so ``generate`` and evaluation behave as they always did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from simpo.packing import kernels
from simpo.packing.kernels import AttentionStyle, by_segment
from simpo.packing.layout import AttentionLayout, LayoutIndex

# ---- Attention by segments as an operator of PyTorch, which ``torch.compile`` does not look into.

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor[] index, float scale, int? window, float? softcap"
)


def by_segment_operator(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, style: AttentionStyle
) -> Tensor:
    """:func:`~simpo.packing.kernels.by_segment`, without dropout, for compiled graphs.

    Backward computes the attention again: an operator cannot keep what PyTorch's own attention keeps for backward.
    """
    return _forward(query, key, value, style.sinks, list(layout.index), style.scale, style.window, style.softcap)


def _attention(index: list[Tensor], scale: float, window: int | None, softcap: float | None) -> Callable[..., Tensor]:
    layout = AttentionLayout.of_index(LayoutIndex(*index))

    def attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        return by_segment(query, key, value, layout, AttentionStyle(scale, window, softcap, sinks))

    return attention


@torch.library.custom_op("simpo::attention_by_segment", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *constants: Any) -> Tensor:
    return _attention(*constants)(query, key, value, sinks).contiguous()


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op(
    "simpo::attention_by_segment_backward", mutates_args=(), schema=f"(Tensor grad, {_INPUTS}) -> Tensor[]"
)
def _backward(grad: Tensor, *inputs: Any) -> list[Tensor]:
    """Gradients of query, key, value and, where there are any, sinks."""
    tensors, constants = _differentiable(inputs), inputs[4:]
    _, pull = torch.func.vjp(_attention(*constants), *tensors)  # autograd.grad is switched off inside an operator
    return [gradient.contiguous() for gradient in pull(grad)]


@_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in _differentiable(inputs)]


def _differentiable(inputs: tuple[Any, ...]) -> list[Tensor]:
    """Query, key, value and, where there are any, sinks."""
    return [tensor for tensor in inputs[:4] if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, sinks, index, *ctx.style = inputs
    ctx.save_for_backward(query, key, value, sinks, *index)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, sinks, *index = ctx.saved_tensors
    d_query, d_key, d_value, *d_sinks = _backward(grad, query, key, value, sinks, index, *ctx.style)
    return d_query, d_key, d_value, (d_sinks[0] if d_sinks else None), [None] * len(index), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# ---- Registration with transformers.

PREFIX = "simpo_"
LAYOUT_ARGUMENT = "attention_layout"
_OWN = "_simpo_own_attention"
# Arguments of attention implementations that change nothing in training without a cache.
_IGNORED = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "cache"}


class UnsupportedAttentionError(Exception):
    """This model's attention needs something that shared-prefix attention does not support."""


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The language model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def install(model: nn.Module) -> None:
    """Route ``model``'s attention through :func:`shared_prefix_attention`, keeping its own for calls without layout.

    Raises :class:`UnsupportedAttentionError` if the model does not use transformers' attention interface.
    """
    model = causal_lm(model)
    own = model.config._attn_implementation
    if own.startswith(PREFIX):
        return
    base = own
    if base not in ("eager", "sdpa"):  # flash and flex kernels need shapes of their own; these give the same numbers
        # the sdpa of older transformers silently ignores a softcap
        softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        base = "sdpa" if model._supports_sdpa and softcap is None else "eager"
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedAttentionError(f"{type(model).__name__} does not use transformers' attention interface")
    name = PREFIX + base
    AttentionInterface.register(name, _dispatch_to(base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)
    setattr(model, _OWN, own)


def uninstall(model: nn.Module) -> None:
    """Give ``model`` its own attention back."""
    model = causal_lm(model)
    name = model.config._attn_implementation
    if name.startswith(PREFIX):
        model.set_attn_implementation(getattr(model, _OWN))


@cache
def _dispatch_to(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        layout = kwargs.pop(LAYOUT_ARGUMENT, None)
        # the vision tower receives the layout as well, but its attention is over patches, and not causal
        if layout is not None and kwargs.get("is_causal") is not False:
            return shared_prefix_attention(module, *args, layout=layout, **kwargs), None
        if base == "eager":
            kind: Any = type(module)
            return _eager_of(kind)(module, *args, **kwargs)
        return ALL_ATTENTION_FUNCTIONS[base](module, *args, **kwargs)

    return attention


@cache
def _eager_of(kind: type) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of the modeling file (each has its own) that ``kind`` or its nearest ancestor comes from."""
    modules = (sys.modules[ancestor.__module__] for ancestor in kind.__mro__)
    return next(m.eager_attention_forward for m in modules if hasattr(m, "eager_attention_forward"))


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, key-value heads, T, D]
    value: Tensor,  # [1, key-value heads, T, D_v]
    attention_mask: Tensor | None,
    *,
    layout: AttentionLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention over a packed batch, ``[1, T, heads, D_v]``, with the arguments of transformers' attention interface.

    ``attention_mask`` is a placeholder: the ``layout`` determines what is visible. The other arguments are described
    by :class:`~simpo.packing.kernels.AttentionStyle`; ``scaling`` is ``D ** -0.5`` if None, ``s_aux`` are sinks.

    Raises:
        UnsupportedAttentionError: an argument that is not supported here, or shapes that are not the layout's.
    """
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _IGNORED]
    if unknown or is_causal is False:
        raise UnsupportedAttentionError(f"attention arguments {unknown or ['is_causal=False']} are not supported")
    total = layout.index.positions.shape[0]
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == total:
        raise UnsupportedAttentionError(f"queries {tuple(query.shape)} are not a packed batch of {total} tokens")
    if layout.windows is not None:
        layout.windows.append(sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # rotations in fp32 leave queries and keys in it
        computed = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(computed) if t.dtype == torch.float32 else t for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    style = AttentionStyle(scale, sliding_window, softcap, s_aux, dropout, layout.blocks is not None)
    attend = layout.kernel or kernels.choose(query, key, value, style)
    if attend is None and torch.compiler.is_compiling():
        attend = _by_segment_uncompiled if style.dropout or style.blocks else by_segment_operator
    return (attend or by_segment)(query, key, value, layout, style)


# With dropout, the operator's backward would draw other random numbers than its forward.
_by_segment_uncompiled = torch.compiler.disable(by_segment)
