"""The only way into a model: a packed batch in, log-probabilities of its responses out."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.objectives import Responses
from simpo.packing.attention import install
from simpo.packing.layout import PackedBatch
from simpo.packing.model import Computation, causal_lm, prepare_policy, state_of, token_logprobs
from simpo.packing.selfcheck import choose_path

ForwardPath = Literal["auto", "packed", "padded"]


def policy_forward(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> Responses:
    """Log-probabilities of the responses of ``batch``, ``[R]`` each, differentiable.

    Args:
        model: a causal language model of transformers, possibly wrapped (DDP, FSDP, DeepSpeed, peft).
        batch: the comparisons.
        path: ``"packed"`` shares prompts and pads nothing; ``"padded"`` gives every response a row of its own;
            ``"auto"`` takes the first if the model proved, once, that both agree.
    """
    return responses_of(batch, policy_logprobs(model, batch, path=path))


def responses_of(batch: PackedBatch, token_logps: Tensor) -> Responses:
    """The responses of ``batch`` from the log-probabilities, ``[S]``, of its scored tokens."""
    batch_lengths = batch.lengths.to(token_logps.device)
    index = batch.response_of.to(token_logps.device)
    logp = token_logps.new_zeros(len(batch_lengths)).index_add(0, index, token_logps)
    return Responses(logp, batch_lengths.to(logp.dtype))


def policy_logprobs(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> Tensor:
    """``[S]`` log-probability, in nats, of every scored token of ``batch``, in its order; fp32 (fp64 for fp64)."""
    return inside_forward(model, batch, token_logprobs, path=path)


def inside_forward(model: nn.Module, batch: PackedBatch, compute: Computation, *, path: ForwardPath = "auto") -> Any:
    """What ``compute`` makes of the unwrapped model and ``batch``, inside the (wrapped) model's forward."""
    inner = prepare_policy(model)
    path = resolve_path(inner, batch, path)
    device = next(inner.parameters()).device
    if device.type != "cpu" and batch.input_ids.device != device:  # weights on the CPU may be offloaded ones
        batch = batch.to(device)
    return model(packed_batch=batch, path=path, compute=compute)


def resolve_path(inner: PreTrainedModel, batch: PackedBatch, path: ForwardPath) -> Literal["packed", "padded"]:
    """The path that ``inner`` takes for ``path``, with its attention in place; checks the model if nothing has.

    Raises:
        SimpoError: ``"packed"`` was asked of a model that cannot share prompts.
    """
    proven = state_of(inner).path or choose_path(inner, batch)
    if path == "packed" and proven == "padded":
        raise SimpoError(f"the packed path is not open to this model ({state_of(inner).reasons[-1]}); use 'auto'")
    chosen = proven if path == "auto" else path
    if chosen == "packed":
        install(causal_lm(inner))  # again, if set_attn_implementation took it out
    return chosen
