"""Shares prompts through a model's own cache, for layers with state and attention that cannot take a packed batch.

A batch is computed in two passes. The first pass runs the prompts, padded on the left, and leaves keys, values,
recurrent states and convolution windows in the cache. The cache is then repeated for each response to a prompt, and the
second pass runs the responses, padded on the right. The gradients of all responses flow back through the cache into the
single computation of their prompt. Rows never mix: comparisons are separate rows of the batch, and padding does not
enter a state. Models mask it, and the self-check compares prompts of different lengths; if a model's results still
change, as with DeepSeek-V4's compression of every few tokens, each comparison gets two passes of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from simpo.packing.layout import PackedBatch

_CACHE_ARGUMENTS = ("past_key_values", "cache_params")  # of models with attention, and of those with states only
_SCAN = "mamba_selective_scan"


class NotShareableError(Exception):
    """A model cannot share prompts; the message tells the user why."""


@dataclass(frozen=True)
class TwoPasses:
    """A batch of ``C`` comparisons with ``R`` responses, as a rectangle of prompts and one of responses."""

    prompt_ids: Tensor  # `[C, P]`, padded on the left
    prompt_mask: Tensor  # `[C, P]` 1 for tokens, 0 for padding
    response_ids: Tensor  # `[R, W]`, padded on the right
    response_mask: Tensor  # `[R, W]`
    comparison_of: Tensor  # `[R]` the comparison of each response
    # `[S]` where the scored tokens are predicted: indices into the prompts' last outputs, `[C]`, followed by all
    # outputs of the responses, `[R * W]`.
    scored: Tensor

    @classmethod
    def of(cls, batch: PackedBatch, only: int | None = None) -> TwoPasses:
        """Build the rectangles of a packed batch, or of comparison number ``only``."""
        device, spans = batch.input_ids.device, batch.layout.spans
        counts = torch.tensor([len(span.responses) for span in spans], device=device)
        prompt_sizes = torch.tensor([span.prompt for span in spans], device=device)
        comparison_of = torch.repeat_interleave(counts)
        # Where a scored token is predicted, relative to its response's first token; -1 is the end of the prompt.
        response_of = batch.response_of
        position = batch.layout.index.positions[batch.scored] - prompt_sizes[comparison_of[response_of]]
        parts = iter(batch.input_ids.split(batch.layout.part_sizes))
        prompts, responses = [], []
        for number, span in enumerate(spans):
            prompt, *answers = (next(parts) for _ in range(1 + len(span.responses)))
            if only in (None, number):
                prompts.append(prompt)
                responses += answers
        if only is not None:
            selected = comparison_of[response_of] == only
            position, response_of = position[selected], response_of[selected] - counts[:only].sum()
            comparison_of = comparison_of.new_zeros(len(responses))
        # At least two tokens: for a single one, models take a shortcut that overwrites the state.
        depth, width = max(map(len, prompts)), max(2, *map(len, responses))
        sizes = [torch.tensor([len(ids) for ids in group], device=device)[:, None] for group in (prompts, responses)]
        return cls(
            prompt_ids=torch.stack([F.pad(ids, (depth - len(ids), 0)) for ids in prompts]),
            prompt_mask=(torch.arange(depth, device=device) >= depth - sizes[0]).long(),
            response_ids=torch.stack([F.pad(ids, (0, width - len(ids))) for ids in responses]),
            response_mask=(torch.arange(width, device=device) < sizes[1]).long(),
            comparison_of=comparison_of,
            scored=torch.where(
                position < 0, comparison_of[response_of], len(prompts) + response_of * width + position.clamp(min=0)
            ),
        )


def outputs_at_scored(
    model: PreTrainedModel, batch: PackedBatch, forward: Callable[..., Tensor], *, separately: bool
) -> Tensor:
    """Run ``forward``, which returns ``[rows, L, D]``, and select its outputs at the scored positions, ``[S, D]``.

    ``model`` is the language model itself, without the wrappers of peft or a distributed engine. With ``separately``,
    each comparison gets its own two passes, so that no prompt is padded on the left. transformers turns
    caches off when it checkpoints layers, so under gradient checkpointing each comparison becomes one checkpoint
    instead, and only its ids are kept for the backward pass.
    """
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if not (checkpointing and model.training and torch.is_grad_enabled()):
        alone = range(len(batch.layout.spans)) if separately else [None]
        return torch.cat([_two_passes(model, TwoPasses.of(batch, only), forward) for only in alone])
    # Ranks that shard weights must run their layers equally often, so the whole batch is one checkpoint.
    comparisons = [None] if is_sharded(model) else range(len(batch.layout.spans))
    return torch.cat([checkpoint(_uncheckpointed, model, batch, c, forward, use_reentrant=False) for c in comparisons])


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether FSDP or DeepSpeed gathers weights layer by layer."""
    return hasattr(next(model.parameters()), "ds_id") or any(isinstance(m, FSDPModule) for m in model.modules())


def _uncheckpointed(
    model: PreTrainedModel, batch: PackedBatch, only: int | None, forward: Callable[..., Tensor]
) -> Tensor:
    """Compute a batch, or one of its comparisons, with caches in use although gradient checkpointing is on."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        return _two_passes(model, TwoPasses.of(batch, only), forward)
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def _two_passes(model: PreTrainedModel, rows: TwoPasses, forward: Callable[..., Tensor]) -> Tensor:
    accepted = inspect.signature(type(model.base_model).forward).parameters
    name = next((name for name in _CACHE_ARGUMENTS if name in accepted), None)
    if name is None:
        raise NotShareableError("its forward takes no cache")
    states = _out_of_place(DynamicCache(config=model.config.get_text_config()))
    shared: dict[str, Any] = {"use_cache": True, name: states}

    def placed(positions: Tensor) -> dict[str, Tensor]:
        return {"position_ids": positions} if "position_ids" in accepted else {}

    positions = (rows.prompt_mask.cumsum(dim=1) - 1).clamp(min=0)
    prompts = forward(input_ids=rows.prompt_ids, attention_mask=rows.prompt_mask, **placed(positions), **shared)
    if not all(map(_is_filled, states.layers)) or not any(map(_has_state, states.layers)):
        raise NotShareableError("not all of its layers store their state in the cache")
    states.reorder_cache(rows.comparison_of)
    mask: Tensor | None = torch.cat([rows.prompt_mask[rows.comparison_of], rows.response_mask], dim=1)
    if not any(getattr(layer, "keys", None) is not None for layer in states.layers):
        mask = None  # without attention, padding on the right of the responses cannot affect other tokens
    start = rows.prompt_mask.sum(dim=1)[rows.comparison_of][:, None]
    positions = start + torch.arange(rows.response_ids.shape[1], device=start.device)
    responses = forward(input_ids=rows.response_ids, attention_mask=mask, **placed(positions), **shared)
    return torch.cat([prompts[:, -1], responses.flatten(0, 1)])[rows.scored]


def _out_of_place(states: DynamicCache) -> DynamicCache:
    """Make the cache replace states instead of overwriting them, because autograd still needs the old ones.

    Overriding the methods on each layer object instead would create reference cycles, which would keep the states and
    the graphs behind them allocated until the garbage collector runs.
    """
    for layer in states.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.__class__ = _replacing_states(type(layer))  # type: ignore[arg-type]
    return states


@cache
def _replacing_states(kind: type) -> type:
    updates = {"update_conv_state": _update_conv_state, "update_recurrent_state": _update_recurrent_state}
    return type(kind.__name__, (kind,), updates)


def _update_conv_state(
    self: Any, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
) -> Tensor:
    """Override the cache's method; if the prompt is shorter than the window, zeros are added on the left."""
    if not self.is_conv_states_initialized[state_idx]:
        self.lazy_initialization(conv_states=conv_states, state_idx=state_idx, conv_kernel_size=conv_kernel_size)
    size = self.conv_kernel_size[state_idx]
    if self.has_previous_state[state_idx]:
        conv_states = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
    elif conv_states.shape[-1] < size:
        conv_states = F.pad(conv_states, (size - conv_states.shape[-1], 0))
    self.has_previous_state[state_idx] = True
    self.conv_states[state_idx] = conv_states[..., -size:]
    return conv_states


def _update_recurrent_state(self: Any, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
    """Override the cache's method."""
    if not self.is_recurrent_states_initialized[state_idx]:
        self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
    self.recurrent_states[state_idx] = recurrent_states
    return recurrent_states


def _is_filled(layer: Any) -> bool:
    """Whether a cache layer holds something, or belongs to a layer that has nothing to store, such as an MLP."""
    return _has_state(layer) or not isinstance(layer, (DynamicLayer, LinearAttentionCacheLayerMixin))


def _has_state(layer: Any) -> bool:
    if getattr(layer, "keys", None) is not None:
        return True
    return isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())


# ---- Mamba 1: in transformers, a scan over several tokens starts from an empty state even if the cache holds one.


def install_scans(model: nn.Module) -> None:
    """Make the Mamba layers of a model start from the state in the cache."""
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and _SCAN in code.co_names and "forward" not in module.__dict__:
            module.forward = MethodType(_forward_from_state, module)


def _forward_from_state(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the layer's own forward, but with a scan that starts from the cached state, if there is one."""
    forward = inspect.unwrap(type(self).forward)
    arguments = inspect.signature(forward).bind(self, *args, **kwargs).arguments
    past = next((arguments[name] for name in _CACHE_ARGUMENTS if arguments.get(name) is not None), None)
    if past is None or not past.has_previous_state(self.layer_idx):
        return type(self).forward(self, *args, **kwargs)
    state = past.layers[self.layer_idx].recurrent_states[0]
    scope = forward.__globals__ | {_SCAN: partial(_scan_from, state, forward.__globals__[_SCAN])}
    rebound = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return rebound(self, *args, **kwargs)


def _scan_from(
    state: Tensor, scan: Callable[..., Any], u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, **kwargs: Any
) -> Any:
    """Run a selective scan from ``state`` ``[N, D, M]``: a scan from zero, plus the state's contribution to each token.

    The recurrence ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`` is linear in ``h_0``, which contributes ``C_t exp(A
    sum(dt_1..t)) h_0`` to the output. Gu and Dao 2023, arXiv 2312.00752, algorithm 2.
    """
    z = kwargs.pop("z", None)
    output, last = scan(u, dt, a, b, c, **kwargs | {"return_last_state": True})
    bias = kwargs.get("delta_bias")
    step = dt if bias is None else dt + bias.to(dt.dtype)[..., None]
    step = F.softplus(step) if kwargs.get("delta_softplus") else step
    decayed = (a[None, :, None] * step.cumsum(-1)[..., None]).exp() * state[:, :, None]  # [N, D, L, M]
    output = output + torch.einsum("nml,ndlm->ndl", c.to(decayed.dtype), decayed).to(output.dtype)
    output = output if z is None else output * F.silu(z)
    return (output, last + decayed[:, :, -1]) if kwargs.get("return_last_state") else output
