"""A model that accepts packed batches: its forward, bound once, its output layer and its reward head.

A call goes through the wrapped module itself: the hooks of DDP, FSDP and DeepSpeed run, and ``save_pretrained``, peft
and ``generate`` keep working on the same object.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from simpo.packing import rope
from simpo.packing.attention import LAYOUT_ARGUMENT
from simpo.packing.layout import PackedBatch, PaddedRows
from simpo.packing.logprobs import Head, fused_logprobs

# What is computed of an unwrapped model, a batch and a path inside the model's forward.
Computation = Callable[[PreTrainedModel, PackedBatch, Literal["packed", "padded"]], Any]


# What is computed of hidden states ``[S, H]`` and the output layer.
OfStates = Callable[[Tensor, Head], Any]


_STATE = "_simpo_policy"


@dataclass
class PolicyState:
    """What is known of a model after its self-check.

    Attributes:
        path: ``"packed"`` or ``"padded"``, what ``"auto"`` stands for; None before the check.
        fused_head: whether the output layer is understood, so that logits need not be materialised.
        alone: whether a row's numbers depend on the other rows of a padded batch, so that each is computed by itself.
        lengths: which rows have the same rotary frequencies, if these depend on a row's length.
        reasons: why a fast path was not taken, in words for the user.
    """

    path: Literal["packed", "padded"] | None = None
    fused_head: bool = True
    alone: bool = False
    lengths: rope.LengthRule | None = None
    reasons: list[str] = field(default_factory=list)


def prepare_policy(model: nn.Module) -> PreTrainedModel:
    """Bind the unwrapped model's forward so that it accepts a packed batch; done once, returns the unwrapped model."""
    inner = model
    while (wrapped := _wrapped_by(inner)) is not None:
        inner = wrapped
    if _STATE not in inner.__dict__:
        if "forward" in inner.__dict__:  # a hook, such as accelerate's, that wraps the model's own forward
            inner.__dict__["_simpo_instance_forward"] = inner.forward
        setattr(inner, _STATE, PolicyState(lengths=rope.install(inner)))
        kind: Any = type(inner)
        inner.forward = MethodType(_forward_of(kind), inner)
    output = _plain_output_layer(inner)
    if output is not None and "forward" not in output.__dict__:
        output.forward = MethodType(_logits_or_other, output)
    return inner


def _wrapped_by(model: nn.Module) -> nn.Module | None:
    for name in ("module", "_orig_mod"):  # DDP, FSDP and DeepSpeed; torch.compile
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return inner
    return None


def state_of(model: nn.Module) -> PolicyState:
    """The self-check's findings for an unwrapped model that :func:`prepare_policy` has seen."""
    return getattr(model, _STATE)


@functools.cache
def _forward_of(kind: Any) -> Callable[..., Any]:
    own = kind.forward

    @functools.wraps(own)  # generate() and Trainer read the signature
    def forward(self: PreTrainedModel, *args: Any, packed_batch: PackedBatch | None = None, **kwargs: Any) -> Any:
        if packed_batch is not None:
            return kwargs.get("compute", token_logprobs)(self, packed_batch, kwargs["path"])
        return original_forward(self, *args, **kwargs)

    return forward


def original_forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The model's forward as it was before :func:`prepare_policy`."""
    instance = model.__dict__.get("_simpo_instance_forward")
    return type(model).forward(model, *args, **kwargs) if instance is None else instance(*args, **kwargs)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The language model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def backbone(model: PreTrainedModel) -> nn.Module:
    """The layers below the output layer, whose first output is ``last_hidden_state``."""
    return causal_lm(model).base_model


def find_head(model: PreTrainedModel) -> Head | None:
    """The output layer as a :class:`Head`, or None if it is not a plain linear layer."""
    module = _plain_output_layer(model)
    if module is None:
        return None
    config = causal_lm(model).config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale = scale / config.logits_scaling
    return Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))


def plain_head(model: PreTrainedModel) -> Head | None:
    """The output layer if the self-check found it to be what :func:`find_head` says, else None."""
    return find_head(model) if state_of(model).fused_head else None


def _plain_output_layer(model: PreTrainedModel) -> nn.Linear | None:
    causal = causal_lm(model)
    module = causal.get_output_embeddings()
    if not isinstance(module, nn.Linear) or backbone(model) is causal:
        return None
    own = module.__dict__.get("forward")  # ours, or a hook of somebody's
    ours = own is None or getattr(own, "__func__", None) is _logits_or_other
    # not by its type, of which FSDP makes a subclass
    return module if ours and type(module).forward is nn.Linear.forward else None


def _logits_or_other(
    self: nn.Linear, hidden: Tensor, *, head: Head | None = None, compute: OfStates | None = None
) -> Any:
    """The forward of a plain output layer, which can make something else of its weights than logits."""
    if head is None or compute is None:
        return nn.Linear.forward(self, hidden)
    return compute(hidden, replace(head, weight=self.weight, bias=self.bias))


def _outputs_at_scored(
    model: PreTrainedModel,
    batch: PackedBatch,
    path: Literal["packed", "padded"],
    forward: Callable[..., Tensor],
) -> Tensor:
    """``[S, D]`` what ``forward`` makes, ``[R, L, D]``, at the scored positions of ``batch``."""
    state = state_of(model)
    if path == "packed":
        batch = batch if state.lengths is None else rope.separated(batch, state.lengths)
        return forward(**_packed_inputs(batch)).flatten(0, 1)[batch.scored]
    rows = PaddedRows.unpack(batch)
    if state.alone:
        each = [ids[None, :size] for ids, size in zip(rows.input_ids, batch.layout.key_sizes, strict=True)]
        found = [forward(input_ids=ids, use_cache=False)[0] for ids in each]
        return pad_sequence(found, batch_first=True).flatten(0, 1)[rows.scored]
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "use_cache": False}
    if state.lengths is not None:  # from the position ids the frequencies are found
        inputs["position_ids"] = rows.attention_mask.cumsum(dim=1) - 1
    return forward(**inputs).flatten(0, 1)[rows.scored]


def _packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments for the backbone."""
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.layout.index.positions[None],
        # an already made, four-dimensional mask passes every model by; the layout says what is seen
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
        "use_cache": False,
        LAYOUT_ARGUMENT: batch.layout,
    }


def scored_states(model: PreTrainedModel, batch: PackedBatch, path: Literal["packed", "padded"]) -> Tensor:
    """``[S, H]`` hidden states that the scored tokens are predicted from."""
    layers = backbone(model)
    return _outputs_at_scored(model, batch, path, lambda **inputs: layers(**inputs)[0])


def at_output_layer(model: PreTrainedModel, states: Tensor, compute: OfStates) -> Any:
    """What ``compute`` makes of hidden ``states``, ``[S, H]``, and the output layer of a model with a plain one.

    It is a call of the layer, so that hooks that gather sharded weights run, and find their gradient.
    """
    output: Any = causal_lm(model).get_output_embeddings()
    return output(states, head=plain_head(model), compute=compute)


def states_logprobs(model: PreTrainedModel, states: Tensor, targets: Tensor) -> Tensor:
    """``[S]`` log-probabilities of ``targets`` from hidden ``states`` ``[S, H]``, for a model with a plain head."""
    return at_output_layer(model, states, lambda hidden, head: fused_logprobs(hidden, head, targets))


def token_logprobs(model: PreTrainedModel, batch: PackedBatch, path: Literal["packed", "padded"]) -> Tensor:
    """The :data:`Computation` of :func:`policy_logprobs`."""
    if plain_head(model) is not None:
        return states_logprobs(model, scored_states(model, batch, path), batch.targets)
    logits = _outputs_at_scored(  # [S, V]
        model, batch, path, lambda **inputs: original_forward(model, **inputs).logits
    )
    exact = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=exact).gather(-1, batch.targets[:, None]).squeeze(-1)


# ---- Rewards of a batch's responses inside a model's forward: by its score head, or as the model itself
# computes them.


def is_reward_model(model: nn.Module) -> bool:
    """Whether an unwrapped model gives a text one number, and no token a probability."""
    inner = causal_lm(model)
    return inner.config.num_labels == 1 and inner.get_output_embeddings() is None


def score_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes a reward of a hidden state, under the name that transformers has for it."""
    return getattr(causal_lm(model), "score", None)


def rewards(model: PreTrainedModel, batch: PackedBatch, path: Literal["packed", "padded"]) -> Tensor:
    """``[R]`` rewards of the responses of ``batch``; fp32 (fp64 for fp64), differentiable."""
    head: Any = score_head(model)
    if head is None or not state_of(model).fused_head:
        return own_rewards(model, batch, path)
    states = end_states(model, batch, path)
    # in the head's own precision also under autocast: rewards are compared, and bf16 has three digits
    with torch.autocast(states.device.type, enabled=False):
        return _exact(head(states.to(next(head.parameters()).dtype)).squeeze(-1))


def end_states(model: PreTrainedModel, batch: PackedBatch, path: Literal["packed", "padded"]) -> Tensor:
    """``[R, H]`` hidden states of the responses' last tokens, which the rewards are made of."""
    ends = batch.layout.index.cu_seqlens_q[1:].long() - 1  # a segment's queries end with its response
    responses = torch.arange(len(ends), device=ends.device)
    return scored_states(model, replace(batch, scored=ends, response_of=responses), path)


def own_rewards(model: PreTrainedModel, batch: PackedBatch, path: Literal["packed", "padded"]) -> Tensor:
    """``[R]`` rewards by the model's own forward, one sequence at a time; for ``path`` it makes no difference."""
    ids = batch.input_ids[batch.layout.index.key_index].split(batch.layout.key_sizes)
    with reading_last_tokens(model):
        return _exact(torch.cat([_own_reward(model, one[None]) for one in ids]))


def _own_reward(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """``[1]`` of a sequence, ``[1, L]``."""
    whole = torch.ones_like(ids)
    return original_forward(model, input_ids=ids, attention_mask=whole, use_cache=False).logits[:, 0]


@contextmanager
def reading_last_tokens(model: nn.Module) -> Iterator[None]:
    """Without a padding token, which a response may end with: the model would read the one before it."""
    config = causal_lm(model).config.get_text_config()
    before, config.pad_token_id = config.pad_token_id, None
    try:
        yield
    finally:
        config.pad_token_id = before


def _exact(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
