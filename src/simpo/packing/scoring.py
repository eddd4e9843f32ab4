"""Scores comparisons with a model: log-probabilities, rewards, and divergence from a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.objectives import Responses
from simpo.packing.batching import RowSizes, fill
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.logprobs import Head, fused_entropy, fused_kl, fused_log_collision, fused_logprobs
from simpo.packing.model import (
    ForwardPath,
    at_output_layer,
    head_scores,
    inside_forward,
    plain_head,
    policy_forward,
    prepare_policy,
    resolve_path,
    reward_forward,
    scored_states,
    state_of,
    token_logprobs,
)
from simpo.packing.selfcheck import Path, rows_to_check

# ---- Any number of comparisons, in batches of a bounded size.


def score_responses(
    model: nn.Module,
    comparisons: Sequence[TokenizedComparison],
    *,
    max_batch_tokens: int = 16384,
    path: ForwardPath = "auto",
) -> Responses:
    """Compute log-probabilities of all responses, ``[R]``, comparison by comparison and response by response.

    Differentiable; wrap the call in ``torch.no_grad()`` if you do not need gradients.

    Args:
        model: a transformers causal language model, possibly wrapped.
        comparisons: prompts with their responses.
        max_batch_tokens: largest number of tokens in one forward (padding included).
        path: see :data:`~simpo.packing.model.ForwardPath`.

    Raises:
        ValueError: no comparisons.
        SimpoError: a comparison is longer than ``max_batch_tokens``.
    """
    batches = bounded_batches(model, comparisons, max_batch_tokens=max_batch_tokens, path=path)
    parts = [policy_forward(model, batch, path=chosen) for batch, chosen in batches]
    return Responses(torch.cat([part.logp for part in parts]), torch.cat([part.length for part in parts]))


def score_answers(
    model: nn.Module,
    comparisons: Sequence[TokenizedComparison],
    *,
    max_batch_tokens: int = 16384,
    path: ForwardPath = "auto",
) -> Tensor:
    """Compute rewards of all responses, ``[R]``, comparison by comparison and response by response, differentiable.

    ``model`` is a transformers sequence classifier with one label, possibly wrapped; responses must include their
    end-of-turn token. Other arguments and errors are as in :func:`score_responses`.
    """
    batches = bounded_batches(model, comparisons, max_batch_tokens=max_batch_tokens, path=path)
    return torch.cat([reward_forward(model, batch, path=chosen) for batch, chosen in batches])


def bounded_batches(
    model: nn.Module, comparisons: Sequence[TokenizedComparison], *, max_batch_tokens: int, path: ForwardPath
) -> Iterator[tuple[PackedBatch, Path]]:
    """Split ``comparisons``, in order, into batches of at most ``max_batch_tokens``; yield each with its path."""
    if not comparisons:
        raise ValueError("there is nothing to score: give at least one comparison")
    inner = prepare_policy(model)
    sample = comparisons[:1]
    if state_of(inner).path is None:
        sample = [comparisons[i] for i in rows_to_check(inner, [c.packed_length for c in comparisons])]
    chosen = resolve_path(inner, PackedBatch.build(sample), path)
    rule = state_of(inner).lengths
    spans = [c.span for c in comparisons]
    packed = [c.packed_length for c in comparisons]
    if rule is not None:  # responses with different rotary frequencies do not share their prompt
        packed = [sum(part.total for part in rule.split(span)) for span in spans]
    columns = ([s.prompt for s in spans], [len(s.responses) for s in spans], [max(s.responses) for s in spans], packed)
    sizes = RowSizes.of(chosen, *map(np.array, columns))
    for run in fill(sizes, range(len(spans)), max_batch_tokens):
        yield PackedBatch.build([comparisons[i] for i in run]), chosen


# ---- A reference next to the policy, and how far the policy has moved away from it.


class ReferenceStates(NamedTuple):
    """A reference's hidden states ``[S, H]`` at the scored tokens, and its output layer."""

    hidden: Tensor
    head: Head


def reference_states(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> ReferenceStates:
    """Compute the states of ``model`` as it is now, without gradients; later changes to its weights do not matter."""

    def compute(inner: PreTrainedModel, batch: PackedBatch, path: Path) -> ReferenceStates:
        def detached(tensor: Tensor) -> Tensor:  # FSDP frees gathered weights, so they are copied
            return tensor.detach().clone() if isinstance(inner, FSDPModule) else tensor.detach()

        def keep(hidden: Tensor, head: Head) -> ReferenceStates:
            bias = None if head.bias is None else detached(head.bias)
            return ReferenceStates(hidden, replace(head, weight=detached(head.weight), bias=bias))

        _check_head(inner, "kl_weight")
        return at_output_layer(inner, scored_states(inner, batch, path), keep)

    with torch.no_grad():
        return inside_forward(model, batch, compute, path=path)


class TokenOutputs(NamedTuple):
    """A policy's outputs at ``S`` scored tokens, ``[S]`` each: fp32 (fp64 for fp64), differentiable."""

    logps: Tensor  # log-probabilities of the tokens
    divergence: Tensor | None = None  # KL(policy || reference), exact over the vocabulary; None without a reference
    entropy: Tensor | None = None  # entropy of the policy, exact over the vocabulary; None unless requested
    log_collision: Tensor | None = None  # `log sum_v p(v)**2` of the policy, without gradient; None unless requested
    values: Tensor | None = None  # the value head's outputs for the states that predict the tokens; None without one


def token_outputs(
    model: nn.Module,
    batch: PackedBatch,
    *,
    reference: ReferenceStates | None = None,
    entropy: bool = False,
    log_collision: bool = False,
    value_head: nn.Module | None = None,
    path: ForwardPath = "auto",
    chunk_bytes: int | None = None,
) -> TokenOutputs:
    """Compute the scored tokens' log-probabilities, and whatever else is requested, in one forward.

    ``chunk_bytes`` bounds the logits held at a time for the log-probabilities, and half of it those for each other
    quantity. By default, each function chooses its own bound.
    """
    if reference is None and not entropy and not log_collision and value_head is None:
        logps = partial(token_logprobs, chunk_bytes=chunk_bytes)
        return TokenOutputs(inside_forward(model, batch, logps, path=path))

    def compute(inner: PreTrainedModel, batch: PackedBatch, path: Path) -> TokenOutputs:
        def at_tokens(hidden: Tensor, head: Head) -> TokenOutputs:
            half = None if chunk_bytes is None else chunk_bytes // 2
            return TokenOutputs(
                fused_logprobs(hidden, head, batch.targets, chunk_bytes=chunk_bytes),
                None if reference is None else fused_kl(hidden, head, *reference, chunk_bytes=half),
                fused_entropy(hidden, head, chunk_bytes=half) if entropy else None,
                fused_log_collision(hidden, head, chunk_bytes=half) if log_collision else None,
            )

        _check_head(inner, "the exact KL, entropy_coef, wpo_weights and a value head")
        states = scored_states(inner, batch, path)
        values = None if value_head is None else head_scores(value_head, states)
        return at_output_layer(inner, states, at_tokens)._replace(values=values)

    return inside_forward(model, batch, compute, path=path)


def mean_by_comparison(batch: PackedBatch, values: Tensor) -> Tensor:
    """Average ``values`` ``[S]`` over the scored tokens of each comparison, all responses together; ``[C]``."""
    owner = batch.layout.index.comparison_of[batch.scored]
    sums = values.new_zeros(len(batch.weights)).index_add(0, owner, values)
    return sums / torch.zeros_like(sums).index_add(0, owner, torch.ones_like(values))


def _check_head(model: PreTrainedModel, feature: str) -> None:
    if plain_head(model) is None:
        raise SimpoError(
            f"{feature}: not supported for {type(model).__name__}, whose output layer is not a plain matrix product; "
            "leave it out"
        )
