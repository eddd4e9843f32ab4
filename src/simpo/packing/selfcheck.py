"""Verifies the fast path once, on the user's own model and data; a path that fails is not used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.packing.attention import UnsupportedAttentionError, causal_lm, install, uninstall
from simpo.packing.cached import NotShareableError, install_scans, is_sharded
from simpo.packing.images import forward_inputs
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.rope import LengthRule
from simpo.packing.rounding import compute_dtype, precision, rounded_differently, rounding_tolerance

logger = logging.getLogger(__name__)

# Largest accepted difference between two log-probabilities of a token (mean, maximum), in nats, by compute dtype;
# relative for hidden states and for rewards above 1.
_TOLERANCE = {
    torch.float64: (1e-5, 1e-4),  # even a float64 model computes parts (norms, softmax) in fp32
    torch.float32: (1e-3, 2e-2),
    torch.bfloat16: (5e-2, 1.0),
    torch.float16: (2e-2, 0.5),
}
# In half precision, rounding alone can exceed that in a deep model. A difference may then be as large as the one caused
# by rounding every intermediate result differently (:func:`rounded_differently`), up to this multiple of the tolerance.
_MAX_RELAXATION = 4
# Largest accepted difference between gradients with respect to the embeddings, relative to their norm.
_GRADIENT_TOLERANCE = {torch.float64: 2e-4, torch.float32: 2e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
_FIRST_ROWS = 16  # the sample is chosen from this many rows and the longest of all
_MAX_LOGITS_BYTES = 2**31  # largest size of one row's logits, which the check materializes
ATTENTION_TYPES = {"full_attention", "sliding_attention"}

Path = Literal["packed", "cached", "padded"]
# A function of the unwrapped model, a batch and a path; it runs inside the model's forward.
Computation = Callable[[PreTrainedModel, PackedBatch, Path], Any]


@dataclass
class PolicyState:
    """The findings of a model's self-check."""

    path: Path | None = None  # the path that `"auto"` selects; None before the check
    # Whether the output layer is a plain matrix product, so that logits need not be materialized.
    fused_head: bool = True
    # Whether every row needs its own forward because its results depend on the other rows of a padded batch.
    separate_rows: bool = False
    # Whether every comparison needs its own forward on the cached path, because padding in front of its prompt would
    # change its results.
    separate_comparisons: bool = False
    lengths: LengthRule | None = None  # which rows have the same rotary frequencies, if those depend on the length
    reasons: list[str] = field(default_factory=list)  # why fast paths are not used, for the user


@dataclass(frozen=True)
class ModelKind:
    """How one kind of model (language model or reward model) is checked."""

    outputs: str  # name of the model's outputs, `[n]`, in messages
    # Computes the outputs with the model's own forward, one sequence at a time.
    own_outputs: Callable[[PreTrainedModel, PackedBatch], Tensor]
    fused_outputs: Computation  # computes the outputs with the fused output layer
    find_head: Callable[[PreTrainedModel], object]  # returns that layer, or None if its form is unknown
    without_head: str  # the consequence of not having it, for messages
    compared: Computation  # computes what paths are compared by: the outputs, or hidden states `[n, H]`
    relative: bool  # whether differences are relative to the largest output, if that is above 1
    difference: str  # template of the message about a difference


def rows_to_check(model: nn.Module, lengths: Sequence[int]) -> list[int]:
    """Return the indices of the first rows and the longest one, from which the self-check chooses its sample.

    ``lengths`` are in tokens. A longest row whose logits would take more than 2 GiB is left out and logged.
    """
    longest = max(range(len(lengths)), key=lambda row: lengths[row], default=0)
    vocabulary = causal_lm(model).config.get_text_config().vocab_size
    fitting = [row for row, length in enumerate(lengths) if length * vocabulary * 4 <= _MAX_LOGITS_BYTES]
    chosen = {*range(min(_FIRST_ROWS, len(lengths))), max(fitting, key=lambda row: lengths[row], default=0)}
    if longest not in chosen:
        logger.warning(
            "the fast path is not checked on the longest row (row %d, %d tokens): its logits would take %.1f GiB",
            longest,
            lengths[longest],
            lengths[longest] * vocabulary * 4 / 2**30,
        )
    return sorted(chosen)


def check_model(model: PreTrainedModel, state: PolicyState, kind: ModelKind, batch: PackedBatch) -> Path:
    """Decide how ``model`` computes batches, record it in ``state``, and log which fast paths are ruled out and why.

    The packed path requires that the layout reaches exactly one attention call per layer, each with the sliding window
    from the configuration, and that log-probabilities for two comparisons of ``batch`` and a short one agree with the
    model's own forward, run on one sequence at a time. The fused output layer is checked in the same way, and so are
    padded batches: if a row's results depend on its neighbors, every response gets its own forward. If the packed path
    is not possible, the cached path is used, provided that its log-probabilities and its gradients agree.
    """
    reported, state.reasons = state.reasons, []
    state.separate_rows = state.separate_comparisons = False
    device = next(model.parameters()).device
    samples = [_sample(batch.comparisons).to(device)]
    if len(batch.comparisons) > _FIRST_ROWS:  # without the longest row, in case its outputs are not finite
        samples.append(_sample(batch.comparisons[:_FIRST_ROWS]).to(device))
    with _eval_mode(model), torch.no_grad():
        for sample in samples:
            expected = {}
            for autocast in _precisions(model, device):
                with precision(device, autocast=autocast):
                    expected[autocast] = kind.own_outputs(model, sample)
            if all(outputs.isfinite().all() for outputs in expected.values()):
                state.path = _check_paths(model, state, kind, sample, expected)
                break
        else:
            state.path, state.fused_head = "padded", False
            state.reasons.append(
                f"its own {kind.outputs} of the first rows are not finite, so nothing could be checked: "
                f"{kind.without_head}, and every response is computed with its own prompt, padded"
            )
    for reason in set(state.reasons) - set(reported):
        logger.warning("%s: %s", type(causal_lm(model)).__name__, reason)
    return state.path


def _sample(comparisons: Sequence[TokenizedComparison]) -> PackedBatch:
    """Build a batch from the two longest comparisons and a few tokens of the shortest.

    There are several so that leaks between comparisons show, long ones so that sliding windows matter, and a short one
    because some models compute short rows differently next to long ones. If any comparison has images, the sample
    includes one. All response tokens are scored, even those that the batch itself does not score.
    """
    ordered = sorted(comparisons, key=lambda comparison: comparison.packed_length)
    longest, illustrated = ordered[-2:], [comparison for comparison in ordered if comparison.images]
    if illustrated and not any(comparison.images for comparison in longest):
        longest[0] = illustrated[-1]
    return PackedBatch.build([*longest, _shortened(ordered[0], 4)])


def _shortened(comparison: TokenizedComparison, prompt: int, responses: int | None = None) -> TokenizedComparison:
    """Cut a comparison to the last ``prompt`` tokens of its prompt and the first four of each response.

    A comparison with images is returned unchanged, because the cut could split an image.
    """
    if comparison.images:
        return comparison
    return TokenizedComparison(
        comparison.prompt_ids[-prompt:], [ids[:4] for ids in comparison.response_ids[:responses]]
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _precisions(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """Yield whether to use autocast: False, so that rounding cannot hide a small leak, and True if the run uses it.

    FSDP gathers weights in the run's compute dtype, so there autocast cannot really be turned off.
    """
    autocast = torch.is_autocast_enabled(device.type)
    if not (autocast and isinstance(model, FSDPModule)):
        yield False
    if autocast:
        yield True


# ---- The reference: the model's own outputs, one sequence at a time, and how far other outputs may be from them.


def naive_logprobs(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Compute log-probabilities of all response tokens with the model's own forward, one sequence at a time.

    Returns ``[S]``, in the order of a batch that scores every response token, as the self-check's sample does.
    """
    _check_causal(model, batch)
    logprobs = []
    for comparison in batch.comparisons:
        for response in comparison.response_ids:
            ids = torch.tensor([comparison.prompt_ids + response], device=batch.input_ids.device)
            images = forward_inputs(causal_lm(model), ids, comparison.images)
            logits = model(input_ids=ids, use_cache=False, **images).logits[0]  # [L, V]
            logits = logits[len(comparison.prompt_ids) - 1 : -1]
            exact = torch.promote_types(logits.dtype, torch.float32)
            targets = ids[0, -len(logits) :, None]
            logprobs.append(torch.log_softmax(logits, dim=-1, dtype=exact).gather(-1, targets).squeeze(-1))
    return torch.cat(logprobs)


def _check_causal(model: PreTrainedModel, batch: PackedBatch) -> None:
    """Raise :class:`SimpoError` unless the model has one output per token, independent of later tokens.

    An encoder sees the token it predicts, so its log-probabilities would be near 0 without any sign of an error.
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
        raise SimpoError(f"model: {name} returns {len(logits)} outputs for {len(sequence)} tokens, not one for each")
    differences = (logits[:-1].log_softmax(dim=-1) - changed[:-1].log_softmax(dim=-1)).abs()
    if logits.isfinite().all() and not _agree(differences, model):
        raise SimpoError(
            f"model: {name} is not causal: its predictions depend on later tokens (by {differences.max():.2g} nats); "
            "if it is an encoder, try setting is_decoder in its configuration"
        )


def unpacked_outputs(model: PreTrainedModel, sample: PackedBatch, compute: Computation) -> Tensor:
    """Run ``compute`` on every response of ``sample`` in a separate forward, and concatenate the results."""
    alone = _separate_responses(sample)
    return torch.cat([model(packed_batch=batch, path="padded", compute=compute) for batch in alone])


def _separate_responses(sample: PackedBatch) -> Iterator[PackedBatch]:
    """Yield every response with its prompt as a batch."""
    for comparison in sample.comparisons:
        for response in comparison.response_ids:
            alone = TokenizedComparison(comparison.prompt_ids, [response], images=comparison.images)
            yield PackedBatch.build([alone]).to(sample.input_ids.device)


def _differences(actual: Tensor, expected: Tensor, kind: ModelKind) -> Tensor:
    """Return ``[n]`` differences; relative to the norm for hidden states, and to max(largest, 1) for rewards."""
    if expected.dim() == 2:
        return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    scale = expected.abs().max().clamp(min=1) if kind.relative else 1
    return (actual - expected).abs() / scale


def _agree(differences: Tensor, model: nn.Module, rounding: Callable[[], Tensor] | None = None) -> bool:
    """Whether differences ``[n]`` are within tolerance, which in half precision ``rounding()`` can relax."""
    sizes, tolerances = (Tensor.mean, Tensor.max), _TOLERANCE[compute_dtype(model)]

    def within(allowed: Sequence[float]) -> bool:  # False for NaN
        return all(bool(size(differences) <= limit) for size, limit in zip(sizes, allowed, strict=True))

    if within(tolerances) or rounding is None or compute_dtype(model).itemsize >= 4:
        return within(tolerances)
    errors = rounding()
    return within([_relaxed(limit, float(size(errors))) for size, limit in zip(sizes, tolerances, strict=True)])


def _relaxed(tolerance: float, rounding: float) -> float:
    return max(tolerance, min(rounding, _MAX_RELAXATION * tolerance))


def _rounding(model: nn.Module, sample: PackedBatch, kind: ModelKind) -> Tensor:
    """Measure the differences ``[n]`` caused by rounding every layer's output once more, in separate forwards."""
    exact = unpacked_outputs(model, sample, kind.compared)
    with rounded_differently(model):
        return _differences(unpacked_outputs(model, sample, kind.compared), exact, kind)


# ---- The checks. ``expected`` holds the model's own outputs without and (if used) with autocast.


def _check_paths(
    model: PreTrainedModel, state: PolicyState, kind: ModelKind, sample: PackedBatch, expected: dict[bool, Tensor]
) -> Path:
    """Check the output layer and the paths; record the reasons and return the fastest path that works."""
    device = sample.input_ids.device
    state.fused_head = kind.find_head(model) is not None
    separate: dict[bool, Tensor] = {}  # the compared quantity, computed in separate forwards
    for autocast, outputs in expected.items():
        if state.fused_head:
            with precision(device, autocast=autocast):
                fused = _fused_outputs(model, sample, kind, outputs)
            state.fused_head = fused is not None
            if fused is not None and kind.compared is kind.fused_outputs:
                separate[autocast] = fused
    if not state.fused_head:
        state.reasons.append(f"its output layer is not a plain matrix product: {kind.without_head}")
        if kind.compared is not kind.fused_outputs:  # hidden states do not determine the outputs of an unknown layer
            return "padded"
        separate = {}  # from here on the outputs are computed without the fused layer
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
        how = "through its cache" + (", one comparison at a time" if state.separate_comparisons else "")
        state.reasons.append(f"prompts are shared {how}, not inside attention: {not_packed}")
        return "cached"
    except NotShareableError as not_cached:
        padded = "by itself" if state.separate_rows else "with its own prompt, padded"
        state.reasons.append(
            f"every response is computed {padded}. Prompts cannot be shared inside attention: {not_packed}. "
            f"Nor through its cache: {not_cached}"
        )
        return "padded"


def _fused_outputs(model: PreTrainedModel, sample: PackedBatch, kind: ModelKind, expected: Tensor) -> Tensor | None:
    """Compute the outputs with the fused output layer in separate forwards; None if they disagree with ``expected``."""
    try:
        outputs = unpacked_outputs(model, sample, kind.fused_outputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # there is more than a matrix product between the hidden states and the outputs
        return None
    return outputs if _agree(_differences(outputs, expected, kind), model) else None


def _check_padded(
    model: PreTrainedModel, state: PolicyState, kind: ModelKind, sample: PackedBatch, separate: Tensor
) -> None:
    """Set ``separate_rows`` if padded rows differ from the same rows on their own by more than rounding explains."""

    def worst(batch: PackedBatch, alone: Tensor) -> float:
        padded = model(packed_batch=batch, path="padded", compute=kind.compared)
        return _differences(padded, alone, kind).max().item()

    # the same response twice needs no padding, so any difference is rounding
    first, device = sample.comparisons[0], sample.input_ids.device
    once, twice = (
        PackedBatch.build(
            [TokenizedComparison(first.prompt_ids, first.response_ids[:1] * copies, images=first.images)]
        ).to(device)
        for copies in (1, 2)
    )
    rounding = worst(twice, torch.cat([unpacked_outputs(model, once, kind.compared)] * 2))
    difference = worst(sample, separate)
    dtype = compute_dtype(model)
    maximum = _TOLERANCE[dtype][1]
    allowed = min(maximum, rounding_tolerance(rounding, dtype))
    if not difference <= allowed and dtype.itemsize < 4:
        allowed = min(maximum, float(_rounding(model, sample, kind).max()))
    if not difference <= allowed:  # NaN counts as different
        state.separate_rows = True
        state.reasons.append(
            f"padding changes its results by {difference:.2g}: wherever prompts are not shared, every response gets "
            "its own forward"
        )


def _check_packed(
    model: PreTrainedModel, state: PolicyState, kind: ModelKind, sample: PackedBatch, expected: Tensor
) -> None:
    """Raise :class:`NotShareableError` unless the layout reaches all attention layers and the results agree."""
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
            f"the layout reached {len(windows)} attention calls in {config.num_hidden_layers} layers"
        )
    sliding = [window for window in windows if window is not None]
    if len(sliding) != _sliding_layers(config, layers) or set(sliding) - {getattr(config, "sliding_window", None)}:
        raise NotShareableError("its sliding windows do not reach its attention")
    if difference is not None:
        raise NotShareableError(difference)


def _check_cached(
    model: PreTrainedModel, state: PolicyState, kind: ModelKind, sample: PackedBatch, expected: Tensor
) -> None:
    """Raise :class:`NotShareableError` unless forward and backward through the model's own cache are correct.

    The backward pass is checked because a state can lose its gradient on the way into the cache, which the outputs do
    not show. With sharded weights it is skipped, because it would trigger the engine's hooks.
    """
    if any(sample.images):
        raise NotShareableError("images cannot be combined with a cache")
    if state.separate_rows:
        raise NotShareableError("a row's results depend on the other rows of a batch")
    if state.lengths is not None:
        raise NotShareableError("its rotary frequencies depend on the length of prompt and response together")
    if any(isinstance(module, CheckpointWrapper) for module in model.modules()):
        raise NotShareableError("FSDP's activation checkpointing runs layers twice, which would fill the cache twice")
    install_scans(model)
    faults = []
    for separately in (False, True) if not is_sharded(model) else (False,):  # its ranks must run layers equally often
        state.separate_comparisons = separately
        try:
            fault = _shared_difference(model, kind, sample, "cached", expected)
        except NotShareableError as error:
            fault = str(error)
        if fault is None:
            break
        faults.append(fault)
    else:
        state.separate_comparisons = False
        raise NotShareableError(faults[0])
    if is_sharded(model):
        return
    # Few and short, because kernels pad them to whole chunks and nothing is checkpointed here; of different lengths, so
    # that the backward pass meets padding.
    short = PackedBatch.build([_shortened(one, 8, 2) for one in sample.comparisons[-2:]]).to(sample.input_ids.device)

    def exact_gradients() -> Tensor:
        return sum(  # one response at a time
            _input_gradients(model, short, partial(model, packed_batch=one, path="padded", compute=kind.compared))
            for one in _separate_responses(short)
        )

    actual = _input_gradients(model, short, partial(model, packed_batch=short, path="cached", compute=kind.compared))
    exact = exact_gradients()
    relative, allowed = float((actual - exact).norm() / exact.norm()), _GRADIENT_TOLERANCE[compute_dtype(model)]
    if not relative <= allowed and compute_dtype(model).itemsize < 4:
        with rounded_differently(model):
            rounded = exact_gradients()
        allowed = _relaxed(allowed, float((rounded - exact).norm() / exact.norm()))
    if not relative <= allowed:  # NaN counts as different
        raise NotShareableError(f"gradients through its cache differ by {relative:.2g} of their norm")


def _shared_difference(
    model: PreTrainedModel, kind: ModelKind, sample: PackedBatch, path: Path, expected: Tensor
) -> str | None:
    """Describe the difference between a path's outputs and the model's own; None if they agree."""
    try:
        outputs = model(packed_batch=sample, path=path, compute=kind.compared)
    except NotShareableError:
        raise
    except Exception as error:  # an unknown model's forward can raise anything
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotShareableError(f"its forward fails on such a batch ({first_line})") from error
    differences = _differences(outputs, expected, kind)
    if _agree(differences, model, rounding=lambda: _rounding(model, sample, kind)):
        return None
    return f"shared and separate {kind.difference.format(differences.max().item())}"


def _input_gradients(model: PreTrainedModel, batch: PackedBatch, outputs: Callable[[], Tensor]) -> Tensor:
    """Compute the gradient of ``outputs().sum()`` with respect to the embeddings of the batch's distinct ids.

    Returns ``[distinct ids, H]`` in fp32.
    """
    distinct = torch.cat([batch.input_ids, batch.input_ids.new_zeros(1)]).unique()  # 0 is the padding
    embedded: list[tuple[Tensor, Tensor]] = []

    def detach(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        embedded.append((arguments[0], leaf))
        return leaf

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(detach)
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(outputs().sum(), [leaf for _, leaf in embedded])
    finally:
        handle.remove()
    total = gradients[0].new_zeros(len(distinct), gradients[0].shape[-1], dtype=torch.float32)
    for (ids, _), gradient in zip(embedded, gradients, strict=True):
        total.index_add_(0, torch.searchsorted(distinct, ids.flatten()), gradient.flatten(0, -2).float())
    return total


def _sliding_layers(config: Any, layers: list[str]) -> int:
    """Return the number of layers with a sliding window, according to the configuration."""
    if getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False:
        return 0
    return layers.count("sliding_attention") if layers else config.num_hidden_layers
