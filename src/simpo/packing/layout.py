"""A micro-batch of comparisons as one flat sequence, and what attention must know of it.

Each comparison is laid out as ``prompt | response 0 | response 1 | ...`` and comparisons follow one another. Position
ids restart at ``len(prompt)`` for every response, so that each one is where generation would put it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simpo.packing.comparison import TokenizedComparison


class Span(NamedTuple):
    """Lengths, in tokens, of one comparison's parts."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens of the whole comparison."""
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class AttentionLayout:
    """Which queries see which keys, handed down to the attention function as a forward keyword argument.

    A comparison's segments are ``prompt + response 0`` with itself as keys, and every further response with
    ``prompt ++ response`` as keys; each is causal, aligned bottom-right.

    Attributes:
        spans: the comparisons, in their order.
        device: where index tensors are put.
        windows: while a model is being probed, the sliding window of every attention call that got this layout.
    """

    spans: tuple[Span, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    windows: list[int | None] | None = None

    @cached_property
    def total(self) -> int:
        """Tokens of the flat sequence, ``T``."""
        return sum(span.total for span in self.spans)

    @cached_property
    def part_sizes(self) -> list[int]:
        """Lengths of all prompts and responses, in the order of the flat sequence."""
        return [size for span in self.spans for size in (span.prompt, *span.responses)]

    @cached_property
    def query_sizes(self) -> list[int]:
        """Lengths of the segments' queries."""
        return [size for span in self.spans for size in (span.prompt + span.responses[0], *span.responses[1:])]

    @cached_property
    def key_sizes(self) -> list[int]:
        """Lengths of the segments' keys."""
        return [span.prompt + size for span in self.spans for size in span.responses]

    @cached_property
    def key_index(self) -> Tensor:
        """``[sum(key_sizes)]`` flat positions of all segments' keys, one segment after the other."""
        pieces, start = [], 0
        for span in self.spans:
            prompt = torch.arange(start, start + span.prompt)
            start += span.prompt
            for size in span.responses:
                pieces += [prompt, torch.arange(start, start + size)]
                start += size
        return torch.cat(pieces).to(self.device)

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        """``[segments + 1]`` int32 cumulative query lengths."""
        return torch.tensor([0, *accumulate(self.query_sizes)], dtype=torch.int32, device=self.device)

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """``[segments + 1]`` int32 cumulative key lengths."""
        return torch.tensor([0, *accumulate(self.key_sizes)], dtype=torch.int32, device=self.device)

    @cached_property
    def comparison_of(self) -> Tensor:
        """``[T]`` which comparison a token belongs to."""
        return _repeat([span.total for span in self.spans], range(len(self.spans))).to(self.device)

    @cached_property
    def part_of(self) -> Tensor:
        """``[T]`` 0 for a prompt's token, k + 1 for one of response k."""
        labels = [k for span in self.spans for k in range(len(span.responses) + 1)]
        return _repeat(self.part_sizes, labels).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """``[T]`` position of a token in ``prompt ++ its response``."""
        pieces = []
        for span in self.spans:
            pieces.append(torch.arange(span.prompt))
            pieces += [torch.arange(span.prompt, span.prompt + size) for size in span.responses]
        return torch.cat(pieces).to(self.device)


def _repeat(sizes: Sequence[int], labels: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(list(labels)), torch.tensor(list(sizes)))


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch: ``C`` comparisons with ``R`` responses in ``T`` tokens, ``S`` of which are scored.

    Attributes:
        input_ids: ``[T]``.
        layout: the comparisons' lengths.
        scored: ``[S]`` flat positions whose next token is scored; the prompt's last is the one before any response.
        targets: ``[S]`` the scored tokens.
        response_of: ``[S]`` which response a scored token belongs to.
        lengths: ``[R]`` scored tokens of each response.
        weights: ``[C]`` weight of each comparison in the loss: 1, or 0 for a filler that evens out the ranks' work.
    """

    input_ids: Tensor
    layout: AttentionLayout
    scored: Tensor
    targets: Tensor
    response_of: Tensor
    lengths: Tensor
    weights: Tensor

    @classmethod
    def build(cls, comparisons: Sequence[TokenizedComparison], weights: Sequence[float] | None = None) -> PackedBatch:
        """Lay out ``comparisons`` one after the other.

        Raises:
            ValueError: there are none, or not one weight each.
        """
        if not comparisons:
            raise ValueError("a batch needs at least one comparison")
        weights = [1.0] * len(comparisons) if weights is None else list(weights)
        if len(weights) != len(comparisons):
            raise ValueError(f"{len(comparisons)} comparisons with {len(weights)} weights")
        ids: list[int] = []
        scored: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for comparison in comparisons:
            ids += comparison.prompt_ids
            last_of_prompt = len(ids) - 1
            for k, response in enumerate(comparison.response_ids):
                mask = [True] * len(response) if comparison.scored is None else comparison.scored[k]
                scored += compress([last_of_prompt, *range(len(ids), len(ids) + len(response) - 1)], mask)
                targets += compress(response, mask)
                lengths.append(sum(mask))
                ids += response
        spans = tuple(Span(len(c.prompt_ids), tuple(map(len, c.response_ids))) for c in comparisons)
        return cls(
            input_ids=torch.tensor(ids),
            layout=AttentionLayout(spans),
            scored=torch.tensor(scored),
            targets=torch.tensor(targets),
            response_of=_repeat(lengths, range(len(lengths))),
            lengths=torch.tensor(lengths),
            weights=torch.tensor(weights),
        )

    @property
    def tokens(self) -> int:
        """Tokens computed, ``T``."""
        return self.layout.total

    @property
    def comparisons(self) -> list[TokenizedComparison]:
        """The comparisons that :meth:`build` was given, with all tokens of their responses scored."""
        parts = iter(self.input_ids.split(self.layout.part_sizes))
        return [
            TokenizedComparison(next(parts).tolist(), [next(parts).tolist() for _ in span.responses])
            for span in self.layout.spans
        ]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch with its tensors on ``device`` (index tensors of the layout follow when they are made)."""
        device = torch.device(device)
        moved = {name: value.to(device, non_blocking=True) for name, value in self._tensors().items()}
        return replace(self, layout=AttentionLayout(self.layout.spans, device), **moved)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory; ``DataLoader`` calls it."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})

    def probing(self) -> PackedBatch:
        """The batch with a layout that records the attention calls that it reaches."""
        return replace(self, layout=replace(self.layout, windows=[]))

    def _tensors(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}


@dataclass(frozen=True)
class PaddedRows:
    """The same responses as ``R`` right-padded rows of ``L`` tokens, each with a prompt of its own.

    Attributes:
        input_ids: ``[R, L]``, padded with token 0 (masked, and never scored).
        attention_mask: ``[R, L]``.
        scored: ``[S]`` positions in the flattened ``[R * L]``, in the order of the packed batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor

    @classmethod
    def unpack(cls, batch: PackedBatch) -> PaddedRows:
        """Undo the sharing of ``batch``'s prompts."""
        sizes = batch.layout.key_sizes
        width = max(sizes)
        device = batch.input_ids.device
        length_of_row = torch.tensor(sizes, device=device)
        mask = torch.arange(width, device=device) < length_of_row[:, None]
        ids = batch.input_ids.new_zeros(len(sizes), width)
        ids[mask] = batch.input_ids[batch.layout.key_index]
        scored = batch.response_of * width + batch.layout.positions[batch.scored]
        return cls(ids, mask.long(), scored)
