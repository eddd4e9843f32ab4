"""Rotary embeddings whose frequencies depend on a sequence's length (``longrope``, ``dynamic``), row by row.

transformers chooses one set of frequencies for a whole forward, by the largest position in it, and ``dynamic`` also
remembers the longest sequence so far. Here every row of a forward gets the frequencies that the model would give it
alone. Sequence lengths are read from the position ids and not from a side channel, which would be gone when gradient
checkpointing recomputes a layer.
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
    """The lengths, in tokens, for which sequences have the same frequencies."""

    borders: tuple[int, ...] = ()  # frequencies switch above each of these lengths (`longrope`)
    # Every length above this one has frequencies of its own (`dynamic`); None if there is no such length.
    growth: int | None = None

    def kinds(self, lengths: Any) -> Any:
        """For integer ``lengths``, an array or tensor: equal numbers for equal frequencies."""
        kind = lengths * 0
        for border in self.borders:
            kind = kind - (lengths > border) * 1
        if self.growth is not None:  # a length is at least 1, and the numbers above are at most 0
            grown = lengths > self.growth
            kind = kind * ~grown + lengths * grown
        return kind

    def split(self, span: Span) -> list[Span]:
        """The parts of a comparison that can share their prompt: runs of responses with the same frequencies."""
        kinds = self.kinds(np.array(span.responses) + span.prompt).tolist()
        runs = groupby(zip(kinds, span.responses, strict=True), key=lambda pair: pair[0])
        return [Span(span.prompt, tuple(size for _, size in run)) for _, run in runs]

    def repeated_prompts(self, prompts: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """``[C]`` tokens that :meth:`split` adds to comparisons with ``prompts`` of these lengths, ``[C]``.

        ``sizes`` ``[R]`` are the lengths of all responses, and ``starts`` ``[C]`` where each comparison's begin.
        """
        counts = np.diff(starts, append=len(sizes))
        kinds = self.kinds(sizes + np.repeat(prompts, counts))
        changes = np.diff(kinds, prepend=kinds[:1]) != 0
        changes[starts] = False
        return prompts * np.add.reduceat(changes.astype(np.int64), starts)


def install(model: nn.Module) -> LengthRule | None:
    """Make the rotary embeddings of ``model`` treat every row separately; None if they do not depend on the length."""
    rules = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        layer_types = list(types) if isinstance(types, dict) else [None]
        found = [rule for layer_type in layer_types if (rule := _rule(module, layer_type)) is not None]
        if found and getattr(module.forward, "__func__", None) is not _row_by_row:
            if "forward" in module.__dict__:  # a hook that wraps the module's own forward
                module.__dict__[_INSTANCE_FORWARD] = module.forward
            module.forward = MethodType(_row_by_row, module)
        rules += found
    if not rules:
        return None
    growths = [rule.growth for rule in rules if rule.growth is not None]
    return LengthRule(tuple(sorted({border for rule in rules for border in rule.borders})), min(growths, default=None))


def _rule(module: Any, layer_type: str | None) -> LengthRule | None:
    """The rule of one rotary embedding of transformers, or of its part for one type of layer; None without one."""
    kind = getattr(module, "rope_type", None)
    kind = kind.get(layer_type) if isinstance(kind, dict) else kind
    if not isinstance(kind, str):
        return None
    if "dynamic" in kind and hasattr(module, "original_max_seq_len"):
        return LengthRule(growth=int(module.original_max_seq_len))
    if kind != "longrope":
        return None
    parameters = getattr(module.config, "rope_parameters", None) or {}
    border = (parameters if layer_type is None else parameters[layer_type]).get("original_max_position_embeddings")
    return None if border is None else LengthRule(borders=(int(border),))  # None: a model with code of its own


def _row_by_row(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a rotary embedding: cosines and sines, ``[B, L, D]``, by the length of each token's sequence."""
    layer_type = kwargs.get("layer_type", args[0] if args else None)
    rule = _rule(self, layer_type)
    own = self.__dict__.get(_INSTANCE_FORWARD) or MethodType(type(self).forward, self)

    def alone(positions: Tensor) -> Any:
        if rule is not None and rule.growth is not None:
            _forget(self, layer_type)
        return own(x, positions, *args, **kwargs)

    if rule is None or position_ids.dim() != 2:
        return alone(position_ids)
    kinds = rule.kinds(_sequence_lengths(position_ids))
    distinct = kinds.unique()
    if len(distinct) == 1:
        return alone(position_ids)
    places = [kinds == kind for kind in distinct]
    parts = [alone(position_ids[place][None]) for place in places]  # [1, n, D] each, or tuples of these

    def merged(parts: Sequence[Tensor]) -> Tensor:  # [B, L, D]
        whole = parts[0].new_empty(*position_ids.shape, parts[0].shape[-1])
        for place, part in zip(places, parts, strict=True):
            whole[place] = part[0]
        return whole

    return merged(parts) if isinstance(parts[0], Tensor) else tuple(map(merged, zip(*parts, strict=True)))


def _sequence_lengths(position_ids: Tensor) -> Tensor:
    """``[B, L]`` length of the sequence that a token belongs to; one starts with every row, and at each position 0."""
    starts = position_ids == 0
    starts[:, 0] = True
    sequence = starts.flatten().cumsum(0) - 1
    lengths = torch.zeros_like(sequence).scatter_reduce(0, sequence, position_ids.flatten() + 1, "amax")
    return lengths[sequence].view_as(position_ids)


def _forget(module: Any, layer_type: str | None) -> None:
    """Reset ``dynamic``, which keeps the frequencies of the longest sequence that it has seen."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    original, now = (getattr(module, f"{prefix}{name}") for name in ("original_inv_freq", "inv_freq"))
    setattr(module, f"{prefix}inv_freq", original.to(now.device, copy=True))
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def separated(batch: PackedBatch, rule: LengthRule) -> PackedBatch:
    """``batch`` with the prompt repeated where neighboring responses have different frequencies; order is kept."""
    spans = tuple(part for span in batch.layout.spans for part in rule.split(span))
    if len(spans) == len(batch.layout.spans):
        return batch
    layout = AttentionLayout(spans, windows=batch.layout.windows).to(batch.input_ids.device)
    old = batch.layout.index
    ids = batch.input_ids.new_empty(layout.total)
    ids[layout.index.key_index] = batch.input_ids[old.key_index]
    firsts = layout.index.cu_seqlens_k[:-1].long()  # the first of every response's keys, its prompt's first token
    scored = layout.index.key_index[firsts[batch.response_of] + old.positions[batch.scored]]
    return replace(batch, input_ids=ids, layout=layout, scored=scored)
