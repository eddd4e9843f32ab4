"""Rewards of responses: packed batches through a sequence classifier of one label, which is what reward models are.

The reward of a response is what the model says at its last token, the end-of-turn token, with the prompt before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simpo.packing.comparison import TokenizedComparison
from simpo.packing.layout import PackedBatch
from simpo.packing.policy import (
    ForwardPath,
    causal_lm,
    inside_forward,
    original_forward,
    scored_states,
    state_of,
)
from simpo.packing.scoring import bounded_batches


def score_answers(
    model: nn.Module,
    comparisons: Sequence[TokenizedComparison],
    *,
    max_batch_tokens: int = 16384,
    path: ForwardPath = "auto",
) -> Tensor:
    """Rewards of all responses, ``[R]``, comparison by comparison and response by response, differentiable.

    Args:
        model: a sequence classifier of transformers with one label, possibly wrapped.
        comparisons: prompts with their responses, each up to its end-of-turn token.
        max_batch_tokens: tokens of one forward (padding included on the padded path).
        path: see :func:`reward_forward`.

    Raises:
        ValueError: no comparisons.
        SimpoError: a comparison is longer than ``max_batch_tokens``.
    """
    batches = bounded_batches(model, comparisons, max_batch_tokens=max_batch_tokens, path=path)
    return torch.cat([reward_forward(model, batch, path=taken) for batch, taken in batches])


def reward_forward(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> Tensor:
    """``[R]`` rewards of the responses of ``batch``; fp32 (fp64 for fp64), differentiable.

    Args:
        model: as of :func:`score_answers`.
        batch: the comparisons.
        path: ``"packed"`` shares prompts and pads nothing; ``"padded"`` gives every response a row of its own;
            ``"auto"`` takes the first if the model proved, once, that both agree.
    """
    return inside_forward(model, batch, rewards, path=path)


def is_reward_model(model: nn.Module) -> bool:
    """Whether an unwrapped model gives a text one number, and no token a probability."""
    inner = causal_lm(model)
    return inner.config.num_labels == 1 and inner.get_output_embeddings() is None


def score_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes a reward of a hidden state, under the name that transformers has for it."""
    return getattr(causal_lm(model), "score", None)


def rewards(model: PreTrainedModel, batch: PackedBatch, path: Literal["packed", "padded"]) -> Tensor:
    """The computation of :func:`reward_forward`."""
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
    with _reading_last_tokens(model):
        return _exact(torch.cat([_own_reward(model, one[None]) for one in ids]))


def _own_reward(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """``[1]`` of a sequence, ``[1, L]``."""
    whole = torch.ones_like(ids)
    return original_forward(model, input_ids=ids, attention_mask=whole, use_cache=False).logits[:, 0]


@contextmanager
def _reading_last_tokens(model: nn.Module) -> Iterator[None]:
    """Without a padding token, which a response may end with: the model would read the one before it."""
    config = causal_lm(model).config.get_text_config()
    before, config.pad_token_id = config.pad_token_id, None
    try:
        yield
    finally:
        config.pad_token_id = before


def _exact(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
