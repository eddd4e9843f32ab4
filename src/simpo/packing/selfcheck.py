"""The fast path is verified once on the user's own model and data, or it is not used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from simpo.packing.attention import UnsupportedAttentionError, install, uninstall
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import (
    Computation,
    PolicyState,
    causal_lm,
    end_states,
    find_head,
    is_reward_model,
    own_rewards,
    prepare_policy,
    rewards,
    score_head,
    state_of,
    token_logprobs,
)

# ---- What a self-check compares: what a model itself says, one sequence at a time, and how far from that is
# too far.


def model_outputs(model: PreTrainedModel, sample: PackedBatch) -> Tensor:
    """What the model's own forward says, one sequence at a time: rewards, ``[R]``, or log-probabilities, ``[S]``."""
    if is_reward_model(model):
        return model(packed_batch=sample, path="padded", compute=own_rewards)
    return naive_logprobs(model, sample)


def unpacked_outputs(model: PreTrainedModel, sample: PackedBatch, compute: Computation) -> Tensor:
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
    """Differences: log-probabilities in nats, hidden states relative to their norm, rewards to max(largest, 1)."""
    if expected.dim() == 2:
        return (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    scale = expected.abs().max().clamp(min=1) if is_reward_model(model) else 1
    return (found - expected).abs() / scale


logger = logging.getLogger(__name__)


# Largest accepted difference of a token's log-probability (mean, maximum), in nats, by the type that computes; for
# hidden states and for rewards above 1 it is relative.
_TOLERANCE = {
    torch.float64: (1e-5, 1e-4),  # models keep fp32 islands (norms, softmax) in a float64 model
    torch.float32: (1e-3, 2e-2),
    torch.bfloat16: (5e-2, 1.0),
    torch.float16: (2e-2, 0.5),
}


_FIRST = 16  # rows that a sample is chosen from, next to the longest of all


_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


class NotShareableError(Exception):
    """Why a model's prompts cannot be shared; the text is for the user."""


def choose_path(model: nn.Module, batch: PackedBatch) -> Literal["packed", "padded"]:
    """Decide, once, how ``model`` computes packed batches, and report what could not be taken and why.

    The packed path is taken if as many attention calls carry the layout as the model has layers, each with the sliding
    window that the configuration promises, and its log-probabilities of two comparisons of ``batch`` and a short one
    agree with those of the model's own forward, one sequence at a time. The fused output layer is checked in the same
    way, and so are padded batches: where a row's numbers depend on its neighbors, every response has a forward of its
    own. Of a
    reward model the layer is checked by its rewards, and the path by the hidden states that they are made of: all
    rewards of a layer that knows nothing yet are alike.
    """
    inner = prepare_policy(model)
    state = state_of(inner)
    said, state.reasons, state.alone = state.reasons, [], False
    path: Literal["packed", "padded"]
    # without the longest row of all if the model's own numbers for that are not finite
    samples = [_sample(chosen).to(next(inner.parameters()).device) for chosen in _candidates(batch)]
    with _evaluating(inner), torch.no_grad():
        precisions = list(_precisions(inner, samples[0].input_ids.device))
        finite = (s for s in samples if all(_in_precision(_is_finite, inner, s, enabled) for enabled in precisions))
        if (sample := next(finite, None)) is not None:
            path = _judge(inner, state, sample, precisions)
        else:
            path, state.fused_head = "padded", False
            figures = "rewards" if is_reward_model(inner) else "log-probabilities"
            state.reasons.append(
                f"its own {figures} of the first rows are not finite, so nothing could be checked: "
                f"{_without_head(inner)}, and every response is computed with a prompt of its own, padded"
            )
    state.path = path
    for reason in set(state.reasons) - set(said):
        logger.warning("%s: %s", type(causal_lm(inner)).__name__, reason)
    return path


def _judge(
    inner: PreTrainedModel, state: PolicyState, sample: PackedBatch, precisions: list[bool]
) -> Literal["packed", "padded"]:
    """Decide on the output layer and the path, with the reasons."""
    state.fused_head = all(_in_precision(_head_agrees, inner, sample, enabled) for enabled in precisions)
    if not state.fused_head:
        state.reasons.append(f"its output layer is not a plain matrix product: {_without_head(inner)}")
        if is_reward_model(inner):
            return "padded"
    for enabled in precisions:
        _in_precision(_check_padded, inner, sample, enabled)
    padded = "computed by itself" if state.alone else "computed with a prompt of its own, padded"
    try:
        install(causal_lm(inner))
        for enabled in precisions:
            _in_precision(_probe, inner, sample, enabled)
        return "packed"
    except (NotShareableError, UnsupportedAttentionError) as error:
        uninstall(causal_lm(inner))
        state.reasons.append(f"{error}: every response is {padded}")
        return "padded"


def _precisions(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """Autocast off, where a small leak cannot hide in rounding, and on if the run uses it, for its kernels.

    Weights that FSDP shards are gathered in the type that the run computes in, so that off would mean nothing.
    """
    autocast = torch.is_autocast_enabled(device.type)
    if not (autocast and isinstance(model, FSDPModule)):
        yield False
    if autocast:
        yield True


def _in_precision(check: Callable[..., Any], model: PreTrainedModel, sample: PackedBatch, enabled: bool) -> Any:
    kind = sample.input_ids.device.type
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=enabled):
        return check(model, sample, model_outputs(model, sample))


def _without_head(model: PreTrainedModel) -> str:
    return "every response has a forward of its own" if is_reward_model(model) else "logits are materialised"


def rows_to_check(model: nn.Module, lengths: Sequence[int]) -> list[int]:
    """Numbers of the rows to choose the self-check's sample from: the first ones and the longest, by their tokens.

    The check materializes logits, so a row whose logits take more than 2 GiB is not added.
    """
    vocabulary = causal_lm(model).config.get_text_config().vocab_size
    first = range(min(_FIRST, len(lengths)))
    fitting = [row for row, length in enumerate(lengths) if length * vocabulary * 4 <= 2**31]
    return sorted({*first, max(fitting, key=lambda row: lengths[row], default=0)})


def _candidates(batch: PackedBatch) -> list[Sequence[TokenizedComparison]]:
    comparisons = batch.comparisons
    return [comparisons, comparisons[:_FIRST]] if len(comparisons) > _FIRST else [comparisons]


def _sample(comparisons: Sequence[TokenizedComparison]) -> PackedBatch:
    """The two longest comparisons, and next to them a few tokens of the shortest.

    Several, so that a leak between comparisons shows; long ones, so that windows matter; a short one, because some
    models compute it differently next to a long one. Responses are scored whole, whatever a batch scores.
    """
    ordered = sorted(comparisons, key=lambda comparison: comparison.packed_length)
    few = TokenizedComparison(ordered[0].prompt_ids[-4:], [response[:4] for response in ordered[0].response_ids])
    return PackedBatch.build([*ordered[-2:], few])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_finite(model: PreTrainedModel, sample: PackedBatch, expected: Tensor) -> bool:
    return bool(expected.isfinite().all())


def _head_agrees(model: PreTrainedModel, sample: PackedBatch, expected: Tensor) -> bool:
    reward = is_reward_model(model)
    if (score_head(model) if reward else find_head(model)) is None:
        return False
    state_of(model).fused_head = True  # the forward takes it, one sequence at a time
    return _agree(unpacked_outputs(model, sample, rewards if reward else token_logprobs), expected, model)


def _check_padded(model: PreTrainedModel, sample: PackedBatch, expected: Tensor) -> None:
    """Find out whether padded rows have the numbers that they have alone, up to what any batch changes by rounding."""
    compute = end_states if is_reward_model(model) else token_logprobs

    def worst(batch: PackedBatch) -> float:
        found = model(packed_batch=batch, path="padded", compute=compute)
        return differences(found, unpacked_outputs(model, batch, compute), model).max().item()

    # one response twice: no padding, and what is left is rounding
    first = sample.comparisons[0]
    twice = PackedBatch.build([TokenizedComparison(first.prompt_ids, first.response_ids[:1] * 2)])
    rounding, difference = worst(twice.to(sample.input_ids.device)), worst(sample)
    maximum = _TOLERANCE[computes_in(model)][1]
    if not difference <= min(maximum, rounding_tolerance(rounding, computes_in(model))):  # written for NaN, too
        state_of(model).alone = True
        state_of(model).reasons.append(
            f"padded batches change its numbers by {difference:.2g}: where prompts are not shared, every response has "
            "a forward of its own"
        )


def rounding_tolerance(rounding: float, dtype: torch.dtype) -> float:
    """Largest difference between two orders of computing a log-probability, in nats, that is taken for rounding.

    Args:
        rounding: a difference that can be nothing else.
        dtype: in which the products are taken.
    """
    return max(16 * rounding, 64 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))


def _probe(model: PreTrainedModel, sample: PackedBatch, expected: Tensor) -> None:
    """Raise :class:`NotShareableError` unless the packed forward is complete and right."""
    config = causal_lm(model).config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [])
    if set(kinds) - _ATTENTION_TYPES:
        raise NotShareableError(f"it has layers of type {', '.join(sorted(set(kinds) - _ATTENTION_TYPES))}")
    probing = sample.probing()
    compute: Computation = token_logprobs
    if is_reward_model(model):
        compute, expected = end_states, unpacked_outputs(model, sample, end_states)
    try:
        found = model(packed_batch=probing, path="packed", compute=compute)
    except Exception as error:  # whatever a foreign forward raises, it means the same
        raise NotShareableError(f"its forward does not take a packed batch ({_first_line(error)})") from error
    windows = probing.layout.windows or []
    if len(windows) != config.num_hidden_layers:
        raise NotShareableError(
            f"{len(windows)} of its {config.num_hidden_layers} layers hand the layout on to their attention"
        )
    sliding = [window for window in windows if window is not None]
    if len(sliding) != _sliding_layers(config, kinds) or set(sliding) - {getattr(config, "sliding_window", None)}:
        raise NotShareableError("its attention is not told of its sliding windows")
    if not _agree(found, expected, model):
        worst = differences(found, expected, model).max().item()
        what, unit = ("hidden states", "of their length") if is_reward_model(model) else ("log-probabilities", "nats")
        raise NotShareableError(f"packed and separate {what} differ by {worst:.2g} {unit}")


def _sliding_layers(config: Any, kinds: list[str]) -> int:
    """How many layers the configuration says have a sliding window."""
    if getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False:
        return 0
    return kinds.count("sliding_attention") if kinds else config.num_hidden_layers


def _agree(found: Tensor, expected: Tensor, model: nn.Module) -> bool:
    mean, maximum = _TOLERANCE[computes_in(model)]
    difference = differences(found, expected, model)
    # written so that a NaN disagrees
    return bool(difference.mean() <= mean) and bool(difference.max() <= maximum)


def computes_in(model: nn.Module) -> torch.dtype:
    """The type that products are taken in: autocast's, the weights' own, or what weights in 4 bits are expanded to."""
    weight = next(model.parameters())
    if weight.dtype != torch.float32:
        return weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    expanded = (getattr(module, "compute_dtype", None) for module in model.modules())
    return next((dtype for dtype in expanded if dtype is not None), weight.dtype)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
