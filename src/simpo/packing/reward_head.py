"""Rewards of a batch's responses inside a model's forward: by its score head, or as the model itself computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simpo.packing.layout import PackedBatch
from simpo.packing.model import causal_lm, original_forward, scored_states, state_of


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
