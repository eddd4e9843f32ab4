"""Applies length-dependent rotary embeddings (``longrope``, ``dynamic``) row by row.

transformers chooses one set of frequencies per forward, based on the largest position in it, and ``dynamic`` also
remembers the longest sequence so far. Here every row gets the frequencies it would get on its own. Sequence lengths are
read from the position ids; a side channel would be gone when gradient checkpointing recomputes a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simpo.packing.layout import AttentionLayout, PackedBatch, Span

_INSTANCE_FORWARD = "_simpo_instance_forward"


class LengthRule(NamedTuple):
    """Which sequence lengths, in tokens, share their frequencies."""

    thresholds: tuple[int, ...] = ()  # frequencies change above each of these lengths (`longrope`)
    # Above this length, every length has its own frequencies (`dynamic`); None if that never happens.
    dynamic_above: int | None = None

    def kinds(self, lengths: Any) -> Any:
        """Map integer ``lengths`` (array or tensor) to numbers that are equal where the frequencies are equal."""
        kind = lengths * 0
        for threshold in self.thresholds:
            kind = kind - (lengths > threshold) * 1
        if self.dynamic_above is not None:  # lengths are at least 1, and the numbers so far are at most 0
            dynamic = lengths > self.dynamic_above
            kind = kind * ~dynamic + lengths * dynamic
        return kind

    def split(self, span: Span) -> list[Span]:
        """Split a comparison into parts that can share a prompt: runs of responses with the same frequencies."""
        kinds = self.kinds(np.array(span.responses) + span.prompt).tolist()
        runs = groupby(zip(kinds, span.responses, strict=True), key=lambda pair: pair[0])
        return [Span(span.prompt, tuple(size for _, size in run)) for _, run in runs]

    def repeated_prompts(self, prompts: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return how many tokens :meth:`split` adds to each comparison by repeating its prompt, ``[C]``.

        ``prompts`` ``[C]`` and ``sizes`` ``[R]`` are the lengths of prompts and responses, and ``starts`` ``[C]`` the
        indices of each comparison's first response.
        """
        counts = np.diff(starts, append=len(sizes))
        kinds = self.kinds(sizes + np.repeat(prompts, counts))
        changes = np.diff(kinds, prepend=kinds[:1]) != 0
        changes[starts] = False
        return prompts * np.add.reduceat(changes.astype(np.int64), starts)


def install(model: nn.Module) -> LengthRule | None:
    """Make the rotary embeddings of ``model`` treat every row separately; return None if length does not matter."""
    rules = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        layer_types = list(types) if isinstance(types, dict) else [None]
        module_rules = [rule for layer_type in layer_types if (rule := _rule(module, layer_type)) is not None]
        if module_rules and getattr(module.forward, "__func__", None) is not _row_by_row:
            if "forward" in module.__dict__:  # a hook already wraps the module's own forward
                module.__dict__[_INSTANCE_FORWARD] = module.forward
            module.forward = MethodType(_row_by_row, module)
        rules += module_rules
    if not rules:
        return None
    thresholds = sorted({threshold for rule in rules for threshold in rule.thresholds})
    dynamic = [rule.dynamic_above for rule in rules if rule.dynamic_above is not None]
    return LengthRule(tuple(thresholds), min(dynamic, default=None))


def _rule(module: Any, layer_type: str | None) -> LengthRule | None:
    """Return the rule of a transformers rotary embedding (for one layer type, if it has several), or None."""
    kind = getattr(module, "rope_type", None)
    kind = kind.get(layer_type) if isinstance(kind, dict) else kind
    if not isinstance(kind, str):
        return None
    if "dynamic" in kind and hasattr(module, "original_max_seq_len"):
        return LengthRule(dynamic_above=int(module.original_max_seq_len))
    if kind != "longrope":
        return None
    parameters = getattr(module.config, "rope_parameters", None) or {}
    threshold = (parameters if layer_type is None else parameters[layer_type]).get("original_max_position_embeddings")
    return None if threshold is None else LengthRule(thresholds=(int(threshold),))  # custom code may have no threshold


def _row_by_row(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute cosines and sines ``[B, L, D]``, each token's frequencies chosen by the length of its sequence."""
    layer_type = kwargs.get("layer_type", args[0] if args else None)
    rule = _rule(self, layer_type)
    original = self.__dict__.get(_INSTANCE_FORWARD) or MethodType(type(self).forward, self)

    def compute(positions: Tensor) -> Any:
        if rule is not None and rule.dynamic_above is not None:
            _reset_dynamic(self, layer_type)
        return original(x, positions, *args, **kwargs)

    if rule is None or position_ids.dim() != 2:
        return compute(position_ids)
    kinds = rule.kinds(_sequence_lengths(position_ids))
    distinct = kinds.unique()
    if len(distinct) == 1:
        return compute(position_ids)
    masks = [kinds == kind for kind in distinct]
    parts = [compute(position_ids[mask][None]) for mask in masks]  # [1, n, D] each, or tuples of these

    def merge(parts: Sequence[Tensor]) -> Tensor:  # [B, L, D]
        whole = parts[0].new_empty(*position_ids.shape, parts[0].shape[-1])
        for mask, part in zip(masks, parts, strict=True):
            whole[mask] = part[0]
        return whole

    return merge(parts) if isinstance(parts[0], Tensor) else tuple(map(merge, zip(*parts, strict=True)))


def _sequence_lengths(position_ids: Tensor) -> Tensor:
    """Return the length of each token's sequence, ``[B, L]``; sequences start at each row and at each position 0."""
    starts = position_ids == 0
    starts[:, 0] = True
    sequence = starts.flatten().cumsum(0) - 1
    lengths = torch.zeros_like(sequence).scatter_reduce(0, sequence, position_ids.flatten() + 1, "amax")
    return lengths[sequence].view_as(position_ids)


def _reset_dynamic(module: Any, layer_type: str | None) -> None:
    """Reset ``dynamic``, which otherwise keeps the frequencies of the longest sequence it has seen."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    original, current = (getattr(module, f"{prefix}{name}") for name in ("original_inv_freq", "inv_freq"))
    setattr(module, f"{prefix}inv_freq", original.to(current.device, copy=True))
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def repeat_prompts(batch: PackedBatch, rule: LengthRule) -> PackedBatch:
    """Repeat prompts in ``batch`` wherever neighboring responses have different frequencies; the order stays."""
    spans = tuple(part for span in batch.layout.spans for part in rule.split(span))
    if len(spans) == len(batch.layout.spans):
        return batch
    layout = AttentionLayout(spans, windows=batch.layout.windows).to(batch.input_ids.device)
    old = batch.layout.index
    ids = batch.input_ids.new_empty(layout.total)
    ids[layout.index.key_index] = batch.input_ids[old.key_index]
    firsts = layout.index.cu_seqlens_k[:-1].long()  # every response's first key, which is its prompt's first token
    scored = layout.index.key_index[firsts[batch.response_of] + old.positions[batch.scored]]
    return replace(batch, input_ids=ids, layout=layout, scored=scored)
