"""A reference's hidden states computed alongside the policy's forward, and how far the policy has moved from them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.objectives import Responses
from simpo.packing.layout import PackedBatch
from simpo.packing.logprobs import Head, fused_kl, fused_logprobs
from simpo.packing.model import at_output_layer, plain_head, scored_states
from simpo.packing.policy import ForwardPath, inside_forward, responses_of


class ReferenceStates(NamedTuple):
    """What a reference predicts the ``S`` scored tokens of a batch from: hidden states ``[S, H]`` and output layer."""

    hidden: Tensor
    head: Head


def reference_states(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> ReferenceStates:
    """Those of ``model`` as it is now, which later changes of its weights' data leave alone; without gradients.

    Raises:
        SimpoError: the model's output layer is not a plain matrix product.
    """

    def compute(inner: PreTrainedModel, batch: PackedBatch, path: Literal["packed", "padded"]) -> ReferenceStates:
        _check_head(inner)
        return at_output_layer(inner, scored_states(inner, batch, path), partial(_kept, inner))

    with torch.no_grad():
        return inside_forward(model, batch, compute, path=path)


def divergence_forward(
    model: nn.Module, batch: PackedBatch, reference: ReferenceStates, *, path: ForwardPath = "auto"
) -> tuple[Responses, Tensor]:
    """As :func:`~simpo.packing.policy.policy_forward`, and ``[S]`` KL(policy || reference) at every scored token."""

    def compute(inner: PreTrainedModel, batch: PackedBatch, path: Literal["packed", "padded"]) -> tuple[Tensor, Tensor]:
        _check_head(inner)
        return at_output_layer(inner, scored_states(inner, batch, path), both)

    def both(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        return fused_logprobs(hidden, head, batch.targets), fused_kl(hidden, head, *reference)

    token_logps, divergence = inside_forward(model, batch, compute, path=path)
    return responses_of(batch, token_logps), divergence


def mean_by_comparison(batch: PackedBatch, values: Tensor) -> Tensor:
    """``[C]`` means over the scored tokens of each comparison, all responses together, of ``values`` ``[S]``."""
    owner = batch.layout.index.comparison_of[batch.scored]
    sums = values.new_zeros(len(batch.weights)).index_add(0, owner, values)
    return sums / torch.zeros_like(sums).index_add(0, owner, torch.ones_like(values))


def _kept(model: PreTrainedModel, hidden: Tensor, head: Head) -> ReferenceStates:
    """Whatever becomes of the model's weights; FSDP frees what it has gathered."""
    tensors = (None if tensor is None else tensor.detach() for tensor in (head.weight, head.bias))
    weight, bias = (t.clone() if t is not None and isinstance(model, FSDPModule) else t for t in tensors)
    assert weight is not None
    return ReferenceStates(hidden, replace(head, weight=weight, bias=bias))


def _check_head(model: PreTrainedModel) -> None:
    if plain_head(model) is None:
        raise SimpoError(
            f"kl_weight: {type(model).__name__}'s output layer is not a plain matrix product, which the KL term needs; "
            "set kl_weight: 0"
        )
