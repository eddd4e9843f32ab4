"""Rewards of responses: packed batches through a sequence classifier of one label, which is what reward models are.

The reward of a response is what the model says at its last token, the end-of-turn token, with the prompt before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simpo.packing.comparison import TokenizedComparison
from simpo.packing.layout import PackedBatch
from simpo.packing.policy import ForwardPath, inside_forward
from simpo.packing.reward_head import rewards
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
