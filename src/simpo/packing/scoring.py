"""Log-probabilities and rewards of any number of comparisons, in batches of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from simpo.objectives import Responses
from simpo.packing.batching import fill_in_order
from simpo.packing.layout import PackedBatch, Span, TokenizedComparison
from simpo.packing.model import prepare_policy, rewards, state_of
from simpo.packing.policy import ForwardPath, inside_forward, policy_forward, resolve_path
from simpo.packing.selfcheck import rows_to_check


def score_responses(
    model: nn.Module,
    comparisons: Sequence[TokenizedComparison],
    *,
    max_batch_tokens: int = 16384,
    path: ForwardPath = "auto",
) -> Responses:
    """Log-probabilities of all responses, ``[R]``, comparison by comparison and response by response.

    Differentiable; wrap the call in ``torch.no_grad()`` where gradients are not wanted.

    Args:
        model: a causal language model of transformers, possibly wrapped.
        comparisons: prompts with their responses.
        max_batch_tokens: tokens of one forward (padding included on the padded path).
        path: see :func:`~simpo.packing.policy.policy_forward`.

    Raises:
        ValueError: no comparisons.
        SimpoError: a comparison is longer than ``max_batch_tokens``.
    """
    parts = [
        policy_forward(model, batch, path=taken)
        for batch, taken in bounded_batches(model, comparisons, max_batch_tokens=max_batch_tokens, path=path)
    ]
    return Responses(torch.cat([part.logp for part in parts]), torch.cat([part.length for part in parts]))


def bounded_batches(
    model: nn.Module, comparisons: Sequence[TokenizedComparison], *, max_batch_tokens: int, path: ForwardPath
) -> Iterator[tuple[PackedBatch, ForwardPath]]:
    """Batches of ``comparisons``, in their order, that are within ``max_batch_tokens``, and the path that they take.

    Raises:
        ValueError: no comparisons.
        SimpoError: a comparison is longer than ``max_batch_tokens``.
    """
    if not comparisons:
        raise ValueError("there is nothing to score: give at least one comparison")
    inner = prepare_policy(model)
    sample = [comparisons[i] for i in rows_to_check(inner, [c.packed_length for c in comparisons])]
    path = resolve_path(inner, PackedBatch.build(sample), path)
    packed, rule = path == "packed", state_of(inner).lengths
    lengths = [c.packed_length if packed else c.padded_length for c in comparisons]
    if packed and rule is not None:  # responses with different rotary frequencies do not share their prompt
        spans = (Span(len(c.prompt_ids), tuple(map(len, c.response_ids))) for c in comparisons)
        lengths = [sum(part.total for part in rule.split(span)) for span in spans]
    rows = None if packed else [len(c.response_ids) for c in comparisons]
    for run in fill_in_order(lengths, max_batch_tokens, rows):
        yield PackedBatch.build([comparisons[i] for i in run]), path


# ---- Rewards of responses: packed batches through a sequence classifier of one label, which is what reward
# models are.


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
