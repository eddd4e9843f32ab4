"""What a self-check compares: what a model itself says, one sequence at a time, and how far from that is too far.

Of a language model these are log-probabilities of tokens, of a reward model rewards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simpo.packing.comparison import TokenizedComparison
from simpo.packing.layout import PackedBatch
from simpo.packing.model import Computation
from simpo.packing.reward_head import is_reward_model, own_rewards


def own_figures(model: PreTrainedModel, sample: PackedBatch) -> Tensor:
    """What the model's own forward says, one sequence at a time: rewards, ``[R]``, or log-probabilities, ``[S]``."""
    if is_reward_model(model):
        return model(packed_batch=sample, path="padded", compute=own_rewards)
    return naive_logprobs(model, sample)


def figures_alone(model: PreTrainedModel, sample: PackedBatch, compute: Computation) -> Tensor:
    """What ``compute`` makes of every response of ``sample``, each in a forward of its own."""
    alone = (
        PackedBatch.build([TokenizedComparison(comparison.prompt_ids, [response])])
        for comparison in sample.comparisons
        for response in comparison.response_ids
    )
    device = sample.input_ids.device
    return torch.cat([model(packed_batch=batch.to(device), path="padded", compute=compute) for batch in alone])


def naive_logprobs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Log-probabilities of all response tokens of ``batch`` by the model's own forward, one sequence at a time.

    ``[S]`` in the order of a batch whose responses are scored whole, as the self-check's sample is.
    """
    found = []
    for ids, scored in _sequences(batch):
        logits = model(input_ids=ids, use_cache=False).logits[0, scored]  # [n, V]
        exact = torch.promote_types(logits.dtype, torch.float32)
        targets = ids[0, -len(logits) :, None]
        found.append(torch.log_softmax(logits, dim=-1, dtype=exact).gather(-1, targets).squeeze(-1))
    return torch.cat(found)


def _sequences(batch: PackedBatch) -> Iterator[tuple[Tensor, slice]]:
    """For every response: ``[1, P + n]`` ids of prompt and response, and the ``n`` positions that predict it."""
    for comparison in batch.comparisons:
        for response in comparison.response_ids:
            ids = torch.tensor([comparison.prompt_ids + response], device=batch.input_ids.device)
            yield ids, slice(len(comparison.prompt_ids) - 1, -1)


def differences(found: Tensor, expected: Tensor, model: nn.Module) -> Tensor:
    """Of log-probabilities in nats, of hidden states relative to their length, of rewards to the largest above 1."""
    if expected.dim() == 2:
        return (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    scale = expected.abs().max().clamp(min=1) if is_reward_model(model) else 1
    return (found - expected).abs() / scale
