"""The fast path is verified once on the user's own model and data, or it is not used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.packing.attention import UnsupportedAttentionError, causal_lm, install, uninstall
from simpo.packing.cached import NotShareableError, install_scans
from simpo.packing.images import forward_inputs
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.rope import LengthRule
from simpo.packing.rounding import computes_in, precision, rounded_differently, rounding_tolerance

logger = logging.getLogger(__name__)

# Largest accepted difference of a token's log-probability (mean, maximum), in nats, by the type that computes; for
# hidden states and for rewards above 1 it is relative.
_TOLERANCE = {
    torch.float64: (1e-5, 1e-4),  # models keep fp32 islands (norms, softmax) in a float64 model
    torch.float32: (1e-3, 2e-2),
    torch.bfloat16: (5e-2, 1.0),
    torch.float16: (2e-2, 0.5),
}
# In half precision a deep model's rounding alone can exceed that. A difference may then be what rounding every
# intermediate result differently does (:func:`rounded_differently`), up to this multiple of the tolerance.
_MOST_TOLERANCES = 4
# The same for gradients by the embeddings, relative to their norm.
_GRADIENT_TOLERANCE = {torch.float64: 2e-4, torch.float32: 2e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
_FIRST = 16  # rows that a sample is chosen from, in addition to the longest of all
_LARGEST_LOGITS = 2**31  # bytes of a row's logits, which the check materializes
ATTENTION_TYPES = {"full_attention", "sliding_attention"}

Path = Literal["packed", "cached", "padded"]
# A function of the unwrapped model, a batch and a path that runs inside the model's forward.
Computation = Callable[[PreTrainedModel, PackedBatch, Path], Any]


@dataclass
class PolicyState:
    """The results of the self-check of a model."""

    path: Path | None = None  # the path that `"auto"` stands for; None before the check
    # Whether the output layer is a plain matrix product, so that logits need not be materialized.
    fused_head: bool = True
    # Whether every row needs its own forward, because its numbers depend on the other rows of a padded batch.
    separate_rows: bool = False
    lengths: LengthRule | None = None  # which rows have the same rotary frequencies, if these depend on a row's length
    reasons: list[str] = field(default_factory=list)  # why a fast path was not taken, for the user


@dataclass(frozen=True)
class Kind:
    """The functions by which language models, or reward models, are checked."""

    outputs: str  # name of what the model computes, `[n]`
    # Computes them by the model's own forward, one sequence at a time.
    own_outputs: Callable[[PreTrainedModel, PackedBatch], Tensor]
    fused_outputs: Computation  # computes them by the fused output layer, if there is one
    find_head: Callable[[PreTrainedModel], object]  # that output layer; None if it is not understood
    without_head: str  # what happens then
    compared: Computation  # what different paths are compared by: the outputs again, or hidden states `[n, H]`
    relative: bool  # whether differences of outputs are relative to the largest output, where that is above 1
    difference: str  # names what is compared in messages


def rows_to_check(model: nn.Module, lengths: Sequence[int]) -> list[int]:
    """Indices of the rows to choose the self-check's sample from: the first ones and the longest, by their tokens.

    A row whose logits take more than 2 GiB is not added, which is logged.
    """
    longest = max(range(len(lengths)), key=lambda row: lengths[row], default=0)
    vocabulary = causal_lm(model).config.get_text_config().vocab_size
    fitting = [row for row, length in enumerate(lengths) if length * vocabulary * 4 <= _LARGEST_LOGITS]
    chosen = {*range(min(_FIRST, len(lengths))), max(fitting, key=lambda row: lengths[row], default=0)}
    if longest not in chosen:
        logger.warning(
            "the check of the fast path leaves out the longest row (row %d, %d tokens): its logits would take %.1f GiB",
            longest,
            lengths[longest],
            lengths[longest] * vocabulary * 4 / 2**30,
        )
    return sorted(chosen)


def check_model(model: PreTrainedModel, state: PolicyState, kind: Kind, batch: PackedBatch) -> Path:
    """Decide, once, how ``model`` computes packed batches, and report which fast paths are not used and why.

    The packed path is used if as many attention calls receive the layout as the model has layers, each with the sliding
    window of the configuration, and if its log-probabilities of two comparisons of ``batch`` and a short one agree with
    those of the model's own forward, one sequence at a time. The fused output layer is checked in the same way, and so
    are padded batches: if a row's numbers depend on its neighbors, every response gets a forward of its own. Where the
    packed path is not possible, the cached path is used if its log-probabilities and its gradients agree. The findings
    are written to ``state``.
    """
    reported, state.reasons, state.separate_rows = state.reasons, [], False
    device = next(model.parameters()).device
    samples = [_sample(batch.comparisons).to(device)]
    if len(batch.comparisons) > _FIRST:  # without the longest row, in case the model's numbers for it are not finite
        samples.append(_sample(batch.comparisons[:_FIRST]).to(device))
    with _evaluating(model), torch.no_grad():
        for sample in samples:
            expected = {}
            for autocast in _precisions(model, device):
                with precision(device, autocast=autocast):
                    expected[autocast] = kind.own_outputs(model, sample)
            if all(outputs.isfinite().all() for outputs in expected.values()):
                state.path = _judge(model, state, kind, sample, expected)
                break
        else:
            state.path, state.fused_head = "padded", False
            state.reasons.append(
                f"its own {kind.outputs} of the first rows are not finite, so nothing could be checked: "
                f"{kind.without_head}, and every response is computed with a prompt of its own, padded"
            )
    for reason in set(state.reasons) - set(reported):
        logger.warning("%s: %s", type(causal_lm(model)).__name__, reason)
    return state.path


def _sample(comparisons: Sequence[TokenizedComparison]) -> PackedBatch:
    """The two longest comparisons, and next to them a few tokens of the shortest.

    Several, so that a leak between comparisons shows; long ones, so that windows matter; a short one, because some
    models compute it differently next to a long one. Where comparisons have images, one of them is among the three.
    Responses are scored completely, whatever a batch scores.
    """
    ordered = sorted(comparisons, key=lambda comparison: comparison.packed_length)
    longest, illustrated = ordered[-2:], [comparison for comparison in ordered if comparison.images]
    if illustrated and not any(comparison.images for comparison in longest):
        longest[0] = illustrated[-1]
    return PackedBatch.build([*longest, _shortened(ordered[0], 4)])


def _shortened(comparison: TokenizedComparison, prompt: int) -> TokenizedComparison:
    """A comparison with the last ``prompt`` tokens of its prompt and the first four of each response.

    One with images is returned unchanged, because a cut could go through an image.
    """
    if comparison.images:
        return comparison
    return TokenizedComparison(comparison.prompt_ids[-prompt:], [ids[:4] for ids in comparison.response_ids])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _precisions(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """Autocast off, where a small leak cannot hide in rounding, and on if the run uses it, for its kernels.

    Weights that FSDP shards are gathered in the type that the run computes in, so that "off" would not be off.
    """
    autocast = torch.is_autocast_enabled(device.type)
    if not (autocast and isinstance(model, FSDPModule)):
        yield False
    if autocast:
        yield True


# ---- What is compared: the model's own outputs, one sequence at a time, and how large a difference may be.


def naive_logprobs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Log-probabilities of all response tokens of ``batch`` by the model's own forward, one sequence at a time.

    ``[S]`` in the order of a batch whose responses are scored completely, as the self-check's sample is.
    """
    _check_causal(model, batch)
    found = []
    for comparison in batch.comparisons:
        for response in comparison.response_ids:
            ids = torch.tensor([comparison.prompt_ids + response], device=batch.input_ids.device)
            given = forward_inputs(causal_lm(model), ids, comparison.images)
            logits = model(input_ids=ids, use_cache=False, **given).logits[0]  # [L, V]
            logits = logits[len(comparison.prompt_ids) - 1 : -1]
            exact = torch.promote_types(logits.dtype, torch.float32)
            targets = ids[0, -len(logits) :, None]
            found.append(torch.log_softmax(logits, dim=-1, dtype=exact).gather(-1, targets).squeeze(-1))
    return torch.cat(found)


def _check_causal(model: PreTrainedModel, batch: PackedBatch) -> None:
    """Raise :class:`SimpoError` if outputs do not belong to tokens, or depend on tokens that come later.

    An encoder predicts a token that it sees: log-probabilities near 0, without any sign of an error.
    """
    shortest = min(batch.comparisons, key=lambda comparison: comparison.packed_length)
    sequence = shortest.prompt_ids + shortest.response_ids[0]
    other = next((token for token in batch.input_ids.tolist() if token != sequence[-1]), None)
    if other is None:
        return
    name, device = type(causal_lm(model)).__name__, batch.input_ids.device
    pair = (torch.tensor([ids], device=device) for ids in (sequence, [*sequence[:-1], other]))
    logits, changed = (
        model(input_ids=ids, use_cache=False, **forward_inputs(causal_lm(model), ids, shortest.images))
        .logits[0]
        .float()
        for ids in pair
    )
    if len(logits) != len(sequence):
        raise SimpoError(f"model: {name} returns {len(logits)} outputs for {len(sequence)} tokens, one each is needed")
    differences = (logits[:-1].log_softmax(dim=-1) - changed[:-1].log_softmax(dim=-1)).abs()
    if logits.isfinite().all() and not _agree(differences, model):
        raise SimpoError(
            f"model: {name} is not causal: what it predicts depends on tokens that come later (by "
            f"{differences.max():.2g} nats). An encoder may have a setting for it: is_decoder in its configuration"
        )


def unpacked_outputs(model: PreTrainedModel, sample: PackedBatch, compute: Computation) -> Tensor:
    """The results of ``compute`` for every response of ``sample`` in a separate forward."""
    alone = (
        PackedBatch.build([TokenizedComparison(comparison.prompt_ids, [response], images=comparison.images)])
        for comparison in sample.comparisons
        for response in comparison.response_ids
    )
    device = sample.input_ids.device
    return torch.cat([model(packed_batch=batch.to(device), path="padded", compute=compute) for batch in alone])


def _differences(found: Tensor, expected: Tensor, kind: Kind) -> Tensor:
    """``[n]`` differences: for hidden states relative to their norm, for rewards relative to max(largest, 1)."""
    if expected.dim() == 2:
        return (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    scale = expected.abs().max().clamp(min=1) if kind.relative else 1
    return (found - expected).abs() / scale


def _agree(differences: Tensor, model: nn.Module, rounding: Callable[[], Tensor] | None = None) -> bool:
    """Whether differences, ``[n]``, are small; in half precision also compared with those of ``rounding``, if given."""
    sizes, tolerances = (Tensor.mean, Tensor.max), _TOLERANCE[computes_in(model)]

    def within(allowed: Sequence[float]) -> bool:
        return all(bool(size(differences) <= limit) for size, limit in zip(sizes, allowed, strict=True))  # not if NaN

    if within(tolerances) or rounding is None or computes_in(model).itemsize >= 4:
        return within(tolerances)
    found = rounding()
    return within([_relaxed(limit, float(size(found))) for size, limit in zip(sizes, tolerances, strict=True)])


def _relaxed(tolerance: float, rounding: float) -> float:
    return max(tolerance, min(rounding, _MOST_TOLERANCES * tolerance))


def _rounding(model: nn.Module, sample: PackedBatch, kind: Kind) -> Tensor:
    """``[n]`` differences that one rounding of every layer's output makes, each response in a forward of its own."""
    exact = unpacked_outputs(model, sample, kind.compared)
    with rounded_differently(model):
        return _differences(unpacked_outputs(model, sample, kind.compared), exact, kind)


# ---- The checks. ``expected`` has the model's own outputs, by whether autocast is on.


def _judge(
    model: PreTrainedModel, state: PolicyState, kind: Kind, sample: PackedBatch, expected: dict[bool, Tensor]
) -> Path:
    """Decide on the output layer and the path, and write down the reasons."""
    device = sample.input_ids.device
    state.fused_head = kind.find_head(model) is not None
    separate: dict[bool, Tensor] = {}  # what is compared, each response in a forward of its own
    for autocast, outputs in expected.items():
        if state.fused_head:
            with precision(device, autocast=autocast):
                found = _fused_outputs(model, sample, kind, outputs)
            state.fused_head = found is not None
            if found is not None and kind.compared is kind.fused_outputs:
                separate[autocast] = found
    if not state.fused_head:
        state.reasons.append(f"its output layer is not a plain matrix product: {kind.without_head}")
        if kind.compared is not kind.fused_outputs:  # hidden states do not determine the outputs of an unknown layer
            return "padded"
        separate = {}  # the outputs are computed in another way from now on
    for autocast in expected:
        with precision(device, autocast=autocast):
            if autocast not in separate:
                separate[autocast] = unpacked_outputs(model, sample, kind.compared)
            _check_padded(model, state, kind, sample, separate[autocast])
    if kind.compared is not kind.fused_outputs:
        expected = separate

    def check(path: Callable[..., None]) -> None:
        for autocast, outputs in expected.items():
            with precision(device, autocast=autocast):
                path(model, state, kind, sample, outputs)

    try:
        check(_check_packed)
        return "packed"
    except (NotShareableError, UnsupportedAttentionError) as error:
        uninstall(model)
        not_packed = error
    try:
        check(_check_cached)
        state.reasons.append(f"prompts are shared through its cache and not inside attention: {not_packed}")
        return "cached"
    except NotShareableError as not_cached:
        padded = "by itself" if state.separate_rows else "with a prompt of its own, padded"
        state.reasons.append(
            f"every response is computed {padded}. Sharing inside attention: {not_packed}. "
            f"Through its cache: {not_cached}"
        )
        return "padded"


def _fused_outputs(model: PreTrainedModel, sample: PackedBatch, kind: Kind, expected: Tensor) -> Tensor | None:
    """The outputs by the fused output layer, each response in a forward of its own; None unless they agree."""
    try:
        found = unpacked_outputs(model, sample, kind.fused_outputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # something else than a product stands between hidden states and the output layer
        return None
    return found if _agree(_differences(found, expected, kind), model) else None


def _check_padded(
    model: PreTrainedModel, state: PolicyState, kind: Kind, sample: PackedBatch, separate: Tensor
) -> None:
    """Set ``separate_rows`` if padded rows differ from the same rows alone by more than any batch does by rounding."""

    def worst(batch: PackedBatch, alone: Tensor) -> float:
        found = model(packed_batch=batch, path="padded", compute=kind.compared)
        return _differences(found, alone, kind).max().item()

    # one response twice: there is no padding, and any difference is rounding
    first, device = sample.comparisons[0], sample.input_ids.device
    once, twice = (
        PackedBatch.build(
            [TokenizedComparison(first.prompt_ids, first.response_ids[:1] * copies, images=first.images)]
        ).to(device)
        for copies in (1, 2)
    )
    rounding = worst(twice, torch.cat([unpacked_outputs(model, once, kind.compared)] * 2))
    difference = worst(sample, separate)
    dtype = computes_in(model)
    maximum = _TOLERANCE[dtype][1]
    allowed = min(maximum, rounding_tolerance(rounding, dtype))
    if not difference <= allowed and dtype.itemsize < 4:
        allowed = min(maximum, float(_rounding(model, sample, kind).max()))
    if not difference <= allowed:  # NaN counts as different
        state.separate_rows = True
        state.reasons.append(
            f"padded batches change its numbers by {difference:.2g}: where prompts are not shared, every response has "
            "a forward of its own"
        )


def _check_packed(
    model: PreTrainedModel, state: PolicyState, kind: Kind, sample: PackedBatch, expected: Tensor
) -> None:
    """Raise :class:`NotShareableError` unless the packed forward is complete and right."""
    install(model)
    config = causal_lm(model).config.get_text_config()
    layers = list(getattr(config, "layer_types", None) or [])
    if unknown := set(layers) - ATTENTION_TYPES:
        raise NotShareableError(f"it has layers of type {', '.join(sorted(unknown))}")
    probing = sample.probing()
    difference = _shared_difference(model, kind, probing, "packed", expected)
    windows = probing.layout.windows or []
    if len(windows) != config.num_hidden_layers:
        raise NotShareableError(
            f"{len(windows)} of its {config.num_hidden_layers} layers hand the layout on to their attention"
        )
    sliding = [window for window in windows if window is not None]
    if len(sliding) != _sliding_layers(config, layers) or set(sliding) - {getattr(config, "sliding_window", None)}:
        raise NotShareableError("its attention does not receive its sliding windows")
    if difference is not None:
        raise NotShareableError(difference)


def _check_cached(
    model: PreTrainedModel, state: PolicyState, kind: Kind, sample: PackedBatch, expected: Tensor
) -> None:
    """Raise :class:`NotShareableError` unless forward and backward are right through the model's own cache.

    The backward pass is checked because a state may lose its gradient on its way into the cache, which no output shows.
    It is left out where weights are sharded: the engine's hooks would run in it.
    """
    if any(sample.images):
        raise NotShareableError("images are not handed to a forward with a cache")
    if state.separate_rows:
        raise NotShareableError("a row's numbers depend on the other rows of a batch")
    if state.lengths is not None:
        raise NotShareableError("its rotary frequencies depend on a row's length, which a prompt does not know yet")
    if any(isinstance(module, CheckpointWrapper) for module in model.modules()):
        raise NotShareableError("FSDP's activation checkpointing computes layers twice, and their caches with them")
    install_scans(model)
    if difference := _shared_difference(model, kind, sample, "cached", expected):
        raise NotShareableError(difference)
    if isinstance(model, FSDPModule) or hasattr(next(model.parameters()), "ds_id"):
        return
    short = PackedBatch.build([_shortened(one, 8) for one in sample.comparisons]).to(sample.input_ids.device)
    found = _input_gradients(model, short, lambda: model(packed_batch=short, path="cached", compute=kind.compared))
    wanted = _input_gradients(model, short, lambda: unpacked_outputs(model, short, kind.compared))
    relative, allowed = float((found - wanted).norm() / wanted.norm()), _GRADIENT_TOLERANCE[computes_in(model)]
    if not relative <= allowed and computes_in(model).itemsize < 4:
        with rounded_differently(model):
            rounded = _input_gradients(model, short, lambda: unpacked_outputs(model, short, kind.compared))
        allowed = _relaxed(allowed, float((rounded - wanted).norm() / wanted.norm()))
    if not relative <= allowed:  # NaN counts as different
        raise NotShareableError(f"gradients through its cache differ by {relative:.2g} of their norm")


def _shared_difference(
    model: PreTrainedModel, kind: Kind, sample: PackedBatch, path: Path, expected: Tensor
) -> str | None:
    """The difference between the outputs of a path and the model's own, as text; None if they agree."""
    try:
        found = model(packed_batch=sample, path=path, compute=kind.compared)
    except NotShareableError:
        raise
    except Exception as error:  # whatever the forward of an unknown model raises, it means the same
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotShareableError(f"its forward does not take such a batch ({first_line})") from error
    differences = _differences(found, expected, kind)
    if _agree(differences, model, rounding=lambda: _rounding(model, sample, kind)):
        return None
    return f"shared and separate {kind.difference.format(differences.max().item())}"


def _input_gradients(model: PreTrainedModel, batch: PackedBatch, outputs: Callable[[], Tensor]) -> Tensor:
    """``[distinct ids, H]`` gradient of the sum of ``outputs()`` by the embeddings of the ids in ``batch``."""
    known = torch.cat([batch.input_ids, batch.input_ids.new_zeros(1)]).unique()  # 0 is the padding
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen.append((arguments[0], leaf))
        return leaf

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(outputs().sum(), [leaf for _, leaf in seen])
    finally:
        handle.remove()
    total = gradients[0].new_zeros(len(known), gradients[0].shape[-1], dtype=torch.float32)
    for (ids, _), gradient in zip(seen, gradients, strict=True):
        total.index_add_(0, torch.searchsorted(known, ids.flatten()), gradient.flatten(0, -2).float())
    return total


def _sliding_layers(config: Any, layers: list[str]) -> int:
    """The number of layers with a sliding window, according to the configuration."""
    if getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False:
        return 0
    return layers.count("sliding_attention") if layers else config.num_hidden_layers
