"""Teaches a model's forward and output layer to accept packed batches, and defines the computations that run there.

Every call goes through the wrapped module itself, so the hooks of DDP, FSDP and DeepSpeed run, and
``save_pretrained``, peft and ``generate`` keep working on the same object.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.objectives import Responses
from simpo.packing import cached, images, rope
from simpo.packing.attention import causal_lm, install
from simpo.packing.layout import PackedBatch, PaddedRows
from simpo.packing.logprobs import Head, fused_logprobs
from simpo.packing.selfcheck import Computation, ModelKind, Path, PolicyState, check_model, naive_logprobs

# "packed" shares prompts inside attention, without padding; "cached" shares them through the model's own cache;
# "padded" gives every response its own row. "auto" uses the first of these that passes the self-check on the model.
ForwardPath = Literal["auto", "packed", "cached", "padded"]

_STATE = "_simpo_policy"


# ---- The entry points: a batch goes in, log-probabilities or rewards come back.


def policy_forward(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> Responses:
    """Compute the log-probabilities of the responses in ``batch``, ``[R]`` each, differentiable.

    Args:
        model: a transformers causal language model, possibly wrapped (DDP, FSDP, DeepSpeed, peft).
        batch: the comparisons.
        path: see :data:`ForwardPath`.
    """
    return responses_of(batch, inside_forward(model, batch, token_logprobs, path=path))


def policy_logprobs(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> Tensor:
    """Compute the log-probability of every scored token, ``[S]`` in nats, in batch order; fp32 (fp64 for fp64)."""
    return inside_forward(model, batch, token_logprobs, path=path)


def reward_forward(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> Tensor:
    """Compute the rewards of the responses in ``batch``, ``[R]``; fp32 (fp64 for fp64), differentiable.

    ``model`` is a transformers sequence classifier with one label, possibly wrapped.
    """
    return inside_forward(model, batch, rewards, path=path)


def value_forward(model: nn.Module, batch: PackedBatch, *, path: ForwardPath = "auto") -> Tensor:
    """Compute values ``[S]``: the score head applied to the states that predict the scored tokens.

    The result is fp32 (fp64 for fp64) and differentiable.
    """

    def compute(inner: PreTrainedModel, batch: PackedBatch, path: Path) -> Tensor:
        head = score_head(inner)
        if head is None or not state_of(inner).fused_head:
            raise SimpoError(
                f"value_model: {type(inner).__name__} has no score head on top of single hidden states; leave it out"
            )
        return head_scores(head, scored_states(inner, batch, path))

    return inside_forward(model, batch, compute, path=path)


def inside_forward(model: nn.Module, batch: PackedBatch, compute: Computation, *, path: ForwardPath = "auto") -> Any:
    """Run ``compute(unwrapped model, batch, path)`` inside the forward of a possibly wrapped ``model``."""
    inner = prepare_policy(model)
    path = resolve_path(inner, batch, path)
    device = next(inner.parameters()).device
    if device.type != "cpu" and batch.input_ids.device != device:  # weights on the CPU may just be offloaded
        batch = batch.to(device)
    return model(packed_batch=batch, path=path, compute=compute)


def resolve_path(inner: PreTrainedModel, batch: PackedBatch, path: ForwardPath) -> Path:
    """Return the path for ``inner``, ready for use; runs the self-check on ``batch`` if it has not run yet."""
    proven = state_of(inner).path or choose_path(inner, batch)
    if path not in ("auto", "padded", proven):
        reason = next(iter(state_of(inner).reasons[-1:]), f"it uses the {proven} path")
        raise SimpoError(f"this model cannot use the {path} path ({reason}); use 'auto'")
    chosen = proven if path == "auto" else path
    if chosen == "packed":
        install(inner)  # set_attn_implementation may have removed it
    return chosen


def responses_of(batch: PackedBatch, token_logps: Tensor) -> Responses:
    """Sum token log-probabilities ``[S]`` into the responses of ``batch``."""
    lengths, index = batch.lengths.to(token_logps.device), batch.response_of.to(token_logps.device)
    logp = token_logps.new_zeros(len(lengths)).index_add(0, index, token_logps)
    return Responses(logp, lengths.to(logp.dtype))


# ---- The two methods that are overridden on a model: its forward and its output layer's.


def prepare_policy(model: nn.Module) -> PreTrainedModel:
    """Unwrap ``model``, make its forward accept a packed batch, and return the unwrapped model. Idempotent."""
    inner: Any = _unwrapped(model)
    if _STATE not in inner.__dict__:
        if "forward" in inner.__dict__:  # a hook, such as accelerate's, already wraps the model's own forward
            inner.__dict__["_simpo_instance_forward"] = inner.forward
        setattr(inner, _STATE, PolicyState(lengths=rope.install(inner)))
        kind: Any = type(inner)
        inner.forward = MethodType(_forward_of(kind), inner)
    output = _plain_output_layer(inner)
    if output is not None and "forward" not in output.__dict__:
        output.forward = MethodType(_logits_or_computation, output)
    return inner


def _unwrapped(model: nn.Module) -> nn.Module:
    for name in ("module", "_orig_mod"):  # DDP, FSDP and DeepSpeed; torch.compile
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return model


def state_of(model: nn.Module) -> PolicyState:
    """Return the self-check's findings for an unwrapped model that went through :func:`prepare_policy`."""
    return getattr(model, _STATE)


@functools.cache
def _forward_of(kind: Any) -> Callable[..., Any]:
    @functools.wraps(kind.forward)  # generate() and Trainer inspect the signature
    def forward(self: PreTrainedModel, *args: Any, packed_batch: PackedBatch | None = None, **kwargs: Any) -> Any:
        if packed_batch is not None:
            return kwargs["compute"](self, packed_batch, kwargs["path"])
        return original_forward(self, *args, **kwargs)

    return forward


def original_forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Call the model's forward as it was before :func:`prepare_policy`."""
    instance = model.__dict__.get("_simpo_instance_forward")
    return type(model).forward(model, *args, **kwargs) if instance is None else instance(*args, **kwargs)


def _logits_or_computation(
    self: nn.Linear, hidden: Tensor, *, head: Head | None = None, compute: Callable[[Tensor, Head], Any] | None = None
) -> Any:
    """Compute logits, or ``compute(hidden, head)`` if given; replaces the forward of a plain output layer."""
    if head is None or compute is None:
        return nn.Linear.forward(self, hidden)
    return compute(hidden, replace(head, weight=self.weight, bias=self.bias))


def at_output_layer(model: PreTrainedModel, states: Tensor, compute: Callable[[Tensor, Head], Any]) -> Any:
    """Run ``compute(states, head)`` inside a call of the model's output layer, which must be a plain one.

    Being inside the call, it sees the gathered weights of a sharded model, and their gradients reach the shards.
    """
    output: Any = causal_lm(model).get_output_embeddings()
    return output(states, head=plain_head(model), compute=compute)


# ---- The parts of a model.


def find_head(model: PreTrainedModel) -> Head | None:
    """Return the output layer as a :class:`Head`, or None if it is not a plain linear layer."""
    module = _plain_output_layer(model)
    if module is None:
        return None
    config = causal_lm(model).config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale = scale / config.logits_scaling
    return Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))


def plain_head(model: PreTrainedModel) -> Head | None:
    """Return :func:`find_head`'s result if the self-check confirmed it, otherwise None."""
    return find_head(model) if state_of(model).fused_head else None


def _plain_output_layer(model: PreTrainedModel) -> nn.Linear | None:
    causal = causal_lm(model)
    module = causal.get_output_embeddings()
    if not isinstance(module, nn.Linear) or causal.base_model is causal:
        return None
    override = module.__dict__.get("forward")  # ours, or a hook installed by another library
    ours = override is None or getattr(override, "__func__", None) is _logits_or_computation
    # compare the method and not the type, because FSDP subclasses it
    return module if ours and type(module).forward is nn.Linear.forward else None


def is_reward_model(model: nn.Module) -> bool:
    """Whether an unwrapped model outputs one number per text rather than token probabilities."""
    inner = causal_lm(model)
    return inner.config.num_labels == 1 and inner.get_output_embeddings() is None


def score_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns a hidden state into a reward (``score`` in transformers), or None."""
    return getattr(causal_lm(model), "score", None)


# ---- The computations that run inside a model's forward: log-probabilities and rewards.


def token_logprobs(model: PreTrainedModel, batch: PackedBatch, path: Path, chunk_bytes: int | None = None) -> Tensor:
    """Compute the log-probabilities of the scored tokens, ``[S]`` in nats; fp32 (fp64 for fp64).

    ``chunk_bytes`` is passed to :func:`~simpo.packing.logprobs.fused_logprobs`.
    """
    if plain_head(model) is not None:
        states = scored_states(model, batch, path)
        compute = functools.partial(fused_logprobs, targets=batch.targets, chunk_bytes=chunk_bytes)
        return at_output_layer(model, states, compute)
    # [S, V]
    logits = _outputs_at_scored(model, batch, path, lambda **inputs: original_forward(model, **inputs).logits)
    exact = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=exact).gather(-1, batch.targets[:, None]).squeeze(-1)


def scored_states(model: PreTrainedModel, batch: PackedBatch, path: Path) -> Tensor:
    """Return the hidden states that predict the scored tokens, ``[S, H]``."""
    layers = causal_lm(model).base_model
    return _outputs_at_scored(model, batch, path, lambda **inputs: layers(**inputs)[0])


def _outputs_at_scored(
    model: PreTrainedModel, batch: PackedBatch, path: Path, forward: Callable[..., Tensor]
) -> Tensor:
    """Run ``forward``, which returns ``[rows, L, D]``, and select its outputs at the scored positions, ``[S, D]``."""
    state = state_of(model)
    if path == "cached":
        return cached.outputs_at_scored(causal_lm(model), batch, forward, separately=state.separate_comparisons)
    if path == "packed":
        batch = batch if state.lengths is None else rope.repeat_prompts(batch, state.lengths)
        outputs = forward(
            input_ids=batch.input_ids[None],
            # models pass a four-dimensional mask through unchanged; visibility comes from the layout
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
            use_cache=False,
            **images.packed_inputs(causal_lm(model), batch),
        )
        return outputs.flatten(0, 1)[batch.scored]
    rows = PaddedRows.unpack(batch)
    if state.separate_rows:
        outputs = [forward(**inputs)[0] for inputs in _single_row_inputs(model, batch)]
        return pad_sequence(outputs, batch_first=True).flatten(0, 1)[rows.scored]
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "use_cache": False}
    if state.lengths is not None:  # the position ids select the rotary frequencies
        inputs["position_ids"] = rows.attention_mask.cumsum(dim=1) - 1
    inputs |= images.forward_inputs(causal_lm(model), rows.input_ids, list(chain.from_iterable(rows.images)))
    return forward(**inputs).flatten(0, 1)[rows.scored]


def _single_row_inputs(model: PreTrainedModel, batch: PackedBatch) -> Iterator[dict[str, Any]]:
    """Yield the inputs of a separate forward for each response, with its prompt and images."""
    rows = PaddedRows.unpack(batch)
    for padded, size, row_images in zip(rows.input_ids, batch.layout.key_sizes, rows.images, strict=True):
        ids = padded[None, :size]
        yield {"input_ids": ids, "use_cache": False, **images.forward_inputs(causal_lm(model), ids, row_images)}


def rewards(model: PreTrainedModel, batch: PackedBatch, path: Path) -> Tensor:
    """Compute the rewards of the responses in ``batch``, ``[R]``; fp32 (fp64 for fp64), differentiable."""
    head: Any = score_head(model)
    if head is None or not state_of(model).fused_head:
        return transformers_rewards(model, batch, path)
    return head_scores(head, end_states(model, batch, path))


def head_scores(head: nn.Module, states: Tensor) -> Tensor:
    """Apply a score head to hidden ``states`` ``[n, H]``; returns ``[n]`` in fp32 (fp64 for fp64).

    Autocast is off: rewards are compared with each other, and bf16 keeps only three digits.
    """
    with torch.autocast(states.device.type, enabled=False):
        scores = head(states.to(next(head.parameters()).dtype)).squeeze(-1)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def end_states(model: PreTrainedModel, batch: PackedBatch, path: Path) -> Tensor:
    """Return the hidden states of the responses' last tokens, ``[R, H]``, which rewards are computed from."""
    ends = batch.layout.index.cu_seqlens_q[1:].long() - 1  # a segment's queries end where its response does
    responses = torch.arange(len(ends), device=ends.device)
    return scored_states(model, replace(batch, scored=ends, response_of=responses), path)


def transformers_rewards(model: PreTrainedModel, batch: PackedBatch, path: Path = "padded") -> Tensor:
    """Compute rewards ``[R]`` with the model's own forward, one sequence at a time; ``path`` is ignored."""
    scores = []
    with reading_last_tokens(model):
        for inputs in _single_row_inputs(model, batch):
            mask = torch.ones_like(inputs["input_ids"])
            scores.append(original_forward(model, attention_mask=mask, **inputs).logits[:, 0])
    return torch.cat(scores).to(torch.promote_types(scores[0].dtype, torch.float32))


@contextmanager
def reading_last_tokens(model: nn.Module) -> Iterator[None]:
    """Make a reward model read the last token, even if it is the padding token.

    With a padding token in its configuration, the model reads the last token that is not padding, which is wrong for a
    response that ends with the padding token.
    """
    config = causal_lm(model).config.get_text_config()
    before, config.pad_token_id = config.pad_token_id, None
    try:
        yield
    finally:
        config.pad_token_id = before


# ---- The self-check for both kinds of models.

_LANGUAGE_MODEL = ModelKind(
    outputs="log-probabilities",
    own_outputs=naive_logprobs,
    fused_outputs=token_logprobs,
    find_head=find_head,
    without_head="logits are materialized",
    compared=token_logprobs,
    relative=False,
    difference="log-probabilities differ by {:.2g} nats",
)
# Paths are compared by hidden states, because an untrained score head gives nearly the same reward to everything.
_REWARD_MODEL = ModelKind(
    outputs="rewards",
    own_outputs=lambda model, batch: model(packed_batch=batch, path="padded", compute=transformers_rewards),
    fused_outputs=rewards,
    find_head=score_head,
    without_head="every response gets its own forward",
    compared=end_states,
    relative=True,
    difference="hidden states differ by {:.2g} of their norm",
)


def choose_path(model: nn.Module, batch: PackedBatch) -> Path:
    """Decide how ``model`` computes packed batches, by running the self-check on ``batch``."""
    inner = prepare_policy(model)
    return check_model(inner, state_of(inner), _REWARD_MODEL if is_reward_model(inner) else _LANGUAGE_MODEL, batch)
