"""Implements shared-prefix attention: its definition, kernels that are verified against it, and its registration.

It is registered with transformers' attention and mask interfaces. The layout arrives as a keyword argument of the
forward, because a side channel would be gone when gradient checkpointing recomputes a layer. A call without a layout
goes to the model's previous implementation, so ``generate`` and evaluation behave as before.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import varlen as torch_varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from simpo.packing.layout import AttentionLayout, LayoutIndex, Span

logger = logging.getLogger(__name__)

# ---- The definition of shared-prefix attention, one segment at a time: exact on every device and for every dtype.


@dataclass(frozen=True)
class AttentionStyle:
    """The features of a model's attention beyond softmax(q k^T) v."""

    scale: float  # factor on the scores
    window: int | None = None  # a query sees this many positions, including its own; None for all
    softcap: float | None = None  # bound on the scores, `softcap * tanh(scores / softcap)`; None for no bound
    sinks: Tensor | None = None  # `[heads]` extra logits in the softmax that carry no value; None without sinks
    dropout: float = 0.0  # probability of dropping an attention weight
    blocks: bool = False  # whether the layout has tokens that attend to each other in both directions

    @property
    def plain(self) -> bool:
        """Whether ``scaled_dot_product_attention`` supports all features in use."""
        return self.softcap is None and self.sinks is None


def by_segment(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, style: AttentionStyle) -> Tensor:
    """Compute attention over a packed batch, ``[1, T, heads, D_v]``, with one call per segment.

    Shapes: ``query`` is ``[1, heads, T, D]``, ``key`` is ``[1, key-value heads, T, D]``, and ``value`` is ``[1,
    key-value heads, T, D_v]``.
    """
    groups = query.shape[1] // key.shape[1]
    attend = _sdpa if style.plain else _eager
    # split instead of slicing: its backward is one concatenation, while every slice would allocate a gradient of all T
    queries, blocks = iter(query.split(layout.query_sizes, dim=2)), _blocks_of_keys(layout)
    keys, values = iter(key.split(layout.part_sizes, dim=2)), iter(value.split(layout.part_sizes, dim=2))
    outputs = []
    for span in layout.spans:
        prompt_key, prompt_value = next(keys), next(values)
        for _ in span.responses:
            k = repeat_heads(torch.cat([prompt_key, next(keys)], dim=2), groups)
            v = repeat_heads(torch.cat([prompt_value, next(values)], dim=2), groups)
            outputs.append(attend(next(queries), k, v, style, next(blocks)))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _blocks_of_keys(layout: AttentionLayout) -> Iterator[Tensor | None]:
    """Yield each segment's ``blocks``, ``[keys]``, or None if the layout has none."""
    if layout.blocks is None:
        return repeat(None)
    return iter(layout.blocks[layout.index.key_index].split(layout.key_sizes))


def repeat_heads(states: Tensor, groups: int) -> Tensor:
    """Repeat each head for its group of query heads: ``[1, h, n, D]`` to ``[1, h * groups, n, D]``."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _visible(queries: int, keys: int, window: int | None, blocks: Tensor | None, device: torch.device) -> Tensor:
    """Build a causal mask ``[queries, keys]``, aligned bottom-right, with an optional sliding window.

    Keys with the same number in ``blocks``, ``[keys]``, attend to each other in both directions; -1 means no block.
    """
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)
    mask = column <= row
    if blocks is not None:
        mask = mask | ((blocks[row] == blocks) & (blocks >= 0))
    return mask if window is None else mask & (column > row - window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, style: AttentionStyle, blocks: Tensor | None) -> Tensor:
    """Compute one segment, ``[1, heads, queries, D_v]``, with PyTorch's own attention."""
    queries, keys = q.shape[2], k.shape[2]
    window = None if style.window is None or style.window >= keys else style.window
    triangle = window is None and blocks is None and queries == keys
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if triangle else _visible(queries, keys, window, blocks, q.device),
        dropout_p=style.dropout,
        is_causal=triangle,
        scale=style.scale,
    )


def _eager(q: Tensor, k: Tensor, v: Tensor, style: AttentionStyle, blocks: Tensor | None) -> Tensor:
    """Compute one segment, ``[1, heads, queries, D_v]``, step by step, with softcap and sinks."""
    scores = (q @ k.transpose(-1, -2)) * style.scale  # [1, heads, queries, keys]
    if style.softcap is not None:
        scores = torch.tanh(scores / style.softcap) * style.softcap
    hidden = ~_visible(q.shape[2], k.shape[2], style.window, blocks, q.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    if style.sinks is not None:
        sinks = style.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=exact).to(v.dtype)[..., : k.shape[2]]
    return F.dropout(weights, style.dropout) @ v


# ---- Kernels, each compared with the definition before it is used.

Kernel = Callable[[Tensor, Tensor, Tensor, AttentionLayout, AttentionStyle], Tensor]
_DEVICE = "cuda"  # the device type that the kernels run on
_rejected: set[Kernel] = set()  # kernels that failed a check
# Grouped-query attention; the kernel in torch 2.11 supports it without this argument.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(torch_varlen.varlen_attn).parameters else {}


def varlen(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, style: AttentionStyle) -> Tensor:
    """Compute all segments in one variable-length call; shapes as in :func:`by_segment`.

    A segment that shares its prompt has fewer queries than keys. The kernel's causal mask is aligned bottom-right,
    which is exactly right for a response.
    """
    # [1, h, T, D] -> [keys of all segments, h, D]; backward of the indexing sums the gradients of a shared prompt
    keys, values = (states[0].transpose(0, 1)[layout.index.key_index] for states in (key, value))
    output = torch_varlen.varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        layout.index.cu_seqlens_q,
        layout.index.cu_seqlens_k,
        layout.longest_query,
        layout.longest_key,
        scale=style.scale,
        window_size=(-1 if style.window is None else style.window - 1, 0),
        **_GROUPED,
    )
    return output[None]


def flex(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, style: AttentionStyle) -> Tensor:
    """Run FlexAttention on the flat sequence, for softcap and sinks; its mask expresses which prompts are shared."""
    from torch.nn.attention.flex_attention import AuxRequest  # noqa: PLC0415 - slow import

    softcap = style.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    # compile the softcap in as a constant: torch 2.11 cannot differentiate the kernel if it is an input
    with torch._dynamo.config.patch(specialize_float=True):
        output, aux = _flex_attention(query.device.type)(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=_block_mask(layout, style.window),
            scale=style.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    if style.sinks is not None:  # a sink adds exp(sink) to the softmax's denominator and nothing to its numerator
        share = torch.sigmoid(aux.lse - style.sinks.view(1, -1, 1))
        output = output * share[..., None].to(output.dtype)
    return output.transpose(1, 2)


_flex_uncompiled = torch.compiler.disable(flex)  # it compiles its own kernel, and its mask is built in Python


def _block_mask(layout: AttentionLayout, window: int | None) -> Any:
    """Return FlexAttention's mask, built once per forward for all layers with the same window."""
    from torch.nn.attention.flex_attention import create_block_mask  # noqa: PLC0415 - slow import

    (_, position, comparison, part, *_), blocks = layout.index, layout.blocks

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same_segment = (comparison[i] == comparison[j]) & ((part[j] == 0) | (part[i] == part[j]))
        mask = position[j] <= position[i]
        if blocks is not None:
            mask = mask | ((blocks[i] == blocks[j]) & (blocks[i] >= 0))
        mask = same_segment & mask
        return mask if window is None else mask & (position[j] > position[i] - window)

    if window not in layout.block_masks:
        device = position.device.type
        layout.block_masks[window] = create_block_mask(visible, None, None, layout.total, layout.total, device=device)
    return layout.block_masks[window]


@cache
def _flex_attention(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415 - slow import

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def choose_kernel(query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Kernel | None:
    """Choose a kernel for these inputs, shaped as in :func:`by_segment`, or None if no kernel can be used."""
    if query.device.type != _DEVICE or style.dropout or query.shape[-1] != value.shape[-1]:
        return None
    half = query.dtype in (torch.bfloat16, torch.float16)
    kernel = flex if style.blocks or not style.plain else varlen if half and query.shape[-1] <= 256 else None
    if kernel is None:
        return None
    if torch.compiler.is_compiling():  # the model's self-check has already run every layer, and with it these checks
        return None if kernel in _rejected else _flex_uncompiled if kernel is flex else kernel
    shape = (query.shape[1], key.shape[1], query.shape[-1])
    window = None if style.window is None else min(style.window, 24)  # so that it matters in a small batch
    small = replace(style, window=window, sinks=None)
    return kernel if _is_correct(kernel, query.device, query.dtype, shape, small, style.sinks is not None) else None


@cache
def _is_correct(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    style: AttentionStyle,
    sinks: bool,
) -> bool:
    """Whether ``kernel`` reproduces the definition's output and gradients on a small packed batch; logs if not."""
    heads, kv_heads, size = shape
    layout = AttentionLayout((Span(37, (30, 51)), Span(5, (70, 1, 20)))).to(device)
    if style.blocks:  # two images in the first prompt
        images = torch.full((layout.total,), -1, device=device)
        images[3:12], images[14:33] = 0, 1
        layout = replace(layout, blocks=images)
    generator = torch.Generator(device).manual_seed(0)

    def random(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator, device=device, dtype=torch.float32)

    exact = [random(1, n, layout.total, size).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    style = replace(style, sinks=random(heads) if sinks else None)
    weight = random(1, layout.total, heads, size)
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            expected = _with_gradients(by_segment, exact, layout, style, weight)
            inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
            rounded = replace(style, sinks=None if style.sinks is None else style.sinks.to(dtype))
            actual = _with_gradients(kernel, inputs, layout, rounded, weight)
    except Exception as error:  # whatever a kernel raises, it must not be used
        logger.warning("attention kernel %s failed its check (%s); it will not be used", kernel.__name__, error)
        _rejected.add(kernel)
        return False
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2  # relative to the largest entry
    wrong = [
        name
        for name, a, b in zip(("output", "d_query", "d_key", "d_value"), expected, actual, strict=True)
        if not (a - b.float()).abs().max() <= tolerance * a.abs().max()
    ]
    if wrong:
        logger.warning("attention kernel %s has wrong %s; it will not be used", kernel.__name__, ", ".join(wrong))
        _rejected.add(kernel)
    return not wrong


def _with_gradients(
    kernel: Kernel, inputs: list[Tensor], layout: AttentionLayout, style: AttentionStyle, weight: Tensor
) -> list[Tensor]:
    query, key, value = inputs
    output = kernel(query, key, value, layout, style)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]


# ---- Attention by segments as a PyTorch operator, which ``torch.compile`` does not trace into.

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor[] index, float scale, int? window, float? softcap"
)


def by_segment_operator(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, style: AttentionStyle
) -> Tensor:
    """Compute :func:`by_segment`, without dropout, inside compiled graphs.

    Backward recomputes the attention, because an operator cannot save what PyTorch's attention saves for backward.
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
    """Compute the gradients of query, key, value and, if there are any, sinks."""
    tensors, constants = _differentiable(inputs), inputs[4:]
    _, vjp = torch.func.vjp(_attention(*constants), *tensors)  # autograd.grad is disabled inside an operator
    return [gradient.contiguous() for gradient in vjp(grad)]


@_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in _differentiable(inputs)]


def _differentiable(inputs: tuple[Any, ...]) -> list[Tensor]:
    """Select query, key, value and, if there are any, sinks."""
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
_ORIGINAL = "_simpo_original_attention"
# Arguments of attention implementations that have no effect in training without a cache.
_IGNORED = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "cache"}


class UnsupportedAttentionError(Exception):
    """The model's attention needs something that shared-prefix attention does not support."""


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the language model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def install(model: nn.Module) -> None:
    """Route ``model``'s attention through :func:`shared_prefix_attention`; calls without a layout keep its own.

    Raises :class:`UnsupportedAttentionError` if the model does not use transformers' attention interface.
    """
    model = causal_lm(model)
    original = model.config._attn_implementation
    if original.startswith(PREFIX):
        return
    base = original
    if base not in ("eager", "sdpa"):  # flash and flex kernels need other shapes; these two compute the same
        # sdpa silently ignores a softcap in older versions of transformers
        softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        base = "sdpa" if model._supports_sdpa and softcap is None else "eager"
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedAttentionError(f"{type(model).__name__} does not use transformers' attention interface")
    name = PREFIX + base
    AttentionInterface.register(name, _dispatch_to(base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)
    setattr(model, _ORIGINAL, original)


def uninstall(model: nn.Module) -> None:
    """Restore the attention that ``model`` had before :func:`install`."""
    model = causal_lm(model)
    name = model.config._attn_implementation
    if name.startswith(PREFIX):
        model.set_attn_implementation(getattr(model, _ORIGINAL))


@cache
def _dispatch_to(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        layout = kwargs.pop(LAYOUT_ARGUMENT, None)
        # the vision tower receives the layout too, but its attention is over patches and not causal
        if layout is not None and kwargs.get("is_causal") is not False:
            return shared_prefix_attention(module, *args, layout=layout, **kwargs), None
        if base == "eager":
            kind: Any = type(module)
            return _eager_of(kind)(module, *args, **kwargs)
        return ALL_ATTENTION_FUNCTIONS[base](module, *args, **kwargs)

    return attention


@cache
def _eager_of(kind: type) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Find the eager attention in the modeling file (each has its own) of ``kind`` or its nearest ancestor."""
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
    """Compute attention over a packed batch, ``[1, T, heads, D_v]``, behind transformers' attention interface.

    ``attention_mask`` is a placeholder: visibility comes from the ``layout``. For the other arguments see
    :class:`AttentionStyle`; ``scaling`` defaults to ``D ** -0.5``, and ``s_aux`` are sinks.

    Raises:
        UnsupportedAttentionError: an argument is not supported, or the shapes do not match the layout.
    """
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _IGNORED]
    if unknown or is_causal is False:
        raise UnsupportedAttentionError(f"attention arguments {unknown or ['is_causal=False']} are not supported")
    total = layout.index.positions.shape[0]
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == total:
        raise UnsupportedAttentionError(f"queries {tuple(query.shape)} do not match a packed batch of {total} tokens")
    if layout.windows is not None:
        layout.windows.append(sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings in fp32 make queries and keys fp32 too
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) if t.dtype == torch.float32 else t for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    style = AttentionStyle(scale, sliding_window, softcap, s_aux, dropout, layout.blocks is not None)
    attend = layout.kernel or choose_kernel(query, key, value, style)
    if attend is None and torch.compiler.is_compiling():
        attend = _by_segment_uncompiled if style.dropout or style.blocks else by_segment_operator
    return (attend or by_segment)(query, key, value, layout, style)


# With dropout, the operator's backward would draw different random numbers from its forward.
_by_segment_uncompiled = torch.compiler.disable(by_segment)
