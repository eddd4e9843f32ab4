"""Lays out a micro-batch of comparisons as one flat sequence, and describes the layout to attention in integer tensors.

A comparison is laid out as ``prompt | response 0 | response 1 | ...``, and comparisons follow one another. Position ids
restart at ``len(prompt)`` for every response, as if it had been generated right after the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# ---- One comparison as token ids: a prompt and its K responses.

# The tensors of one image by argument name, such as ``pixel_values``; images are concatenated along dimension 0.
ImageTensors = Mapping[str, Tensor]


class Span(NamedTuple):
    """The lengths, in tokens, of a comparison's prompt and responses."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens in the whole comparison."""
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class TokenizedComparison:
    """One prompt with K responses, stored and computed once.

    A preference pair has K = 2 (chosen first), a ranking K > 2 (best first), a demonstration K = 1.

    Attributes:
        prompt_ids: at least one token; the input that generation would start from.
        response_ids: K lists of at least one token each.
        scored: which tokens of each response are scored, at least one; ``None`` means all. In a multi-turn conversation
            the response is everything after the prompt, including the user's later turns.
        images: the tensors of each image whose tokens are among the ids, in order. A response may contain image tokens
            only if it is the only response (a multi-turn conversation).

    Raises:
        ValueError: an empty prompt, no response, an empty response, or a ``scored`` mask with the wrong shape or
            without any scored token.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    scored: list[list[bool]] | None = None
    images: tuple[ImageTensors, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty: the first token of a response needs a token before it")
        if not self.response_ids:
            raise ValueError("response_ids is empty: a comparison needs at least one response")
        for k, response in enumerate(self.response_ids):
            if not response:
                raise ValueError(f"response_ids[{k}] is empty: its average log-probability would be 0 / 0")
        if self.scored is None:
            return
        if len(self.scored) != len(self.response_ids):
            raise ValueError(f"scored: {len(self.scored)} masks for {len(self.response_ids)} responses")
        for k, (mask, response) in enumerate(zip(self.scored, self.response_ids, strict=True)):
            if len(mask) != len(response):
                raise ValueError(f"scored[{k}] has {len(mask)} entries for {len(response)} tokens")
            if not any(mask):
                raise ValueError(f"scored[{k}] selects no token: its average log-probability would be 0 / 0")

    @property
    def span(self) -> Span:
        """Lengths of the prompt and the responses."""
        return Span(len(self.prompt_ids), tuple(map(len, self.response_ids)))

    @property
    def packed_length(self) -> int:
        """Tokens in the comparison with the prompt stored once."""
        return self.span.total

    @property
    def padded_length(self) -> int:
        """Tokens in the comparison as K padded rows, each with its own copy of the prompt."""
        return len(self.response_ids) * (len(self.prompt_ids) + max(map(len, self.response_ids)))


# ---- The layout of packed comparisons, as lengths and as integer tensors.


class LayoutIndex(NamedTuple):
    """A layout as integer tensors, which is all that kernels and compiled graphs need."""

    sizes: Tensor  # for each comparison `K`, then the lengths of its prompt and `K` responses; stays on the CPU
    positions: Tensor  # `[T]` position of each token in `prompt ++ its response`
    comparison_of: Tensor  # `[T]` which comparison a token belongs to
    part_of: Tensor  # `[T]` 0 for prompt tokens, k + 1 for tokens of response k
    key_index: Tensor  # `[sum(key_sizes)]` flat positions of all segments' keys, one segment after the other
    cu_seqlens_q: Tensor  # `[segments + 1]` int32 cumulative query lengths
    cu_seqlens_k: Tensor  # `[segments + 1]` int32 cumulative key lengths

    @classmethod
    def of(cls, spans: Sequence[Span]) -> LayoutIndex:
        """Build the index of comparisons with these lengths, on the CPU."""
        parts = np.array([size for span in spans for size in (span.prompt, *span.responses)])
        counts = np.array([1 + len(span.responses) for span in spans])  # parts of each comparison
        first = np.cumsum(counts) - counts  # part number of each comparison's prompt
        starts = np.cumsum(parts) - parts
        part_of = np.arange(len(parts)) - np.repeat(first, counts)
        comparison_of = np.repeat(np.arange(len(spans)), counts)
        # where a part starts in ``prompt ++ response``: a prompt at 0, a response after its prompt
        offsets = np.where(part_of == 0, 0, parts[first][comparison_of])
        responses = np.flatnonzero(part_of)  # part numbers of the responses; each is a segment
        prompts = first[comparison_of[responses]]
        keys = np.stack([prompts, responses], axis=1).ravel()  # part numbers of the segments' keys
        first_of_its_prompt = part_of[responses] == 1
        sizes = [size for span in spans for size in (len(span.responses), span.prompt, *span.responses)]
        return cls(
            sizes=torch.tensor(sizes),
            positions=ranges(offsets, parts),
            comparison_of=torch.from_numpy(np.repeat(comparison_of, parts)),
            part_of=torch.from_numpy(np.repeat(part_of, parts)),
            key_index=ranges(starts[keys], parts[keys]),
            cu_seqlens_q=_cumulative(parts[responses] + first_of_its_prompt * parts[prompts]),
            cu_seqlens_k=_cumulative(parts[responses] + parts[prompts]),
        )

    def to(self, device: torch.device) -> LayoutIndex:
        """Move the tensors to ``device``, except for ``sizes``."""
        sizes, *others = self
        return LayoutIndex(sizes, *(tensor.to(device, non_blocking=True) for tensor in others))

    def pin_memory(self) -> LayoutIndex:
        """Copy the tensors to page-locked memory."""
        return LayoutIndex(*(tensor.pin_memory() for tensor in self))


def ranges(starts: np.ndarray, sizes: np.ndarray) -> Tensor:
    """Concatenate the ranges with these starts and sizes, ``[sum(sizes)]``."""
    before = np.cumsum(sizes) - sizes
    return torch.from_numpy(np.arange(sizes.sum()) + np.repeat(starts - before, sizes))


def _cumulative(sizes: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))


@dataclass(frozen=True)
class AttentionLayout:
    """Which keys each query attends to; reaches the attention function as a keyword argument of the forward.

    A comparison consists of segments: ``prompt + response 0`` attends to itself, and every further response attends to
    ``prompt ++ response``. Each segment is causal, aligned bottom-right.

    Attributes:
        spans: the comparisons, in order.
        index: the same as tensors; computed from ``spans`` if not given.
        windows: during the self-check, the sliding window of every attention call that this layout reached.
        block_masks: FlexAttention's masks for this layout, by sliding window, cached across layers.
        kernel: the attention kernel to use; None to choose one and verify it, which needs real tensors.
        blocks: ``[T]`` a number for each image's tokens, which attend to each other in both directions, and -1 for all
            other tokens; None if there are no such tokens.
        longest_query: number of queries in the segment with the most.
        longest_key: number of keys in the segment with the most.
    """

    spans: tuple[Span, ...]
    index: LayoutIndex = field(default=None, compare=False)  # type: ignore[assignment]
    windows: list[int | None] | None = None
    block_masks: dict[int | None, Any] = field(default_factory=dict, compare=False)
    kernel: Any = None
    blocks: Tensor | None = field(default=None, compare=False)
    longest_query: int = field(init=False)
    longest_key: int = field(init=False)

    def __post_init__(self) -> None:
        # fields, because torch.compile cannot trace a cached property
        object.__setattr__(self, "index", LayoutIndex.of(self.spans) if self.index is None else self.index)
        object.__setattr__(self, "longest_query", max(self.query_sizes))
        object.__setattr__(self, "longest_key", max(self.key_sizes))

    @classmethod
    def of_index(cls, index: LayoutIndex) -> AttentionLayout:
        """Recover the layout that ``index`` was computed from."""
        spans, sizes = [], iter(index.sizes.tolist())
        for count in sizes:
            prompt, *responses = islice(sizes, 1 + count)
            spans.append(Span(prompt, tuple(responses)))
        return cls(tuple(spans), index)

    @cached_property
    def total(self) -> int:
        """Tokens in the flat sequence, ``T``."""
        return sum(span.total for span in self.spans)

    @cached_property
    def part_sizes(self) -> list[int]:
        """Lengths of all prompts and responses, in flat order."""
        return [size for span in self.spans for size in (span.prompt, *span.responses)]

    @cached_property
    def query_sizes(self) -> list[int]:
        """Number of queries in each segment."""
        return [size for span in self.spans for size in (span.prompt + span.responses[0], *span.responses[1:])]

    @cached_property
    def key_sizes(self) -> list[int]:
        """Number of keys in each segment."""
        return [span.prompt + size for span in self.spans for size in span.responses]

    def to(self, device: torch.device) -> AttentionLayout:
        """Move the layout's tensors to ``device``."""
        return replace(self, index=self.index.to(device), block_masks={})

    def pin_memory(self) -> AttentionLayout:
        """Copy the layout's tensors to page-locked memory."""
        return replace(self, index=self.index.pin_memory())


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch: ``C`` comparisons with ``R`` responses in ``T`` tokens, ``S`` of which are scored.

    Attributes:
        input_ids: ``[T]``.
        layout: the lengths of the comparisons, and what attention needs to know about them.
        scored: ``[S]`` flat positions that predict a scored token; a response's first token is predicted at the
            prompt's last.
        targets: ``[S]`` the scored tokens.
        response_of: ``[S]`` which response a scored token belongs to.
        lengths: ``[R]`` number of scored tokens in each response.
        weights: ``[C]`` float64, weight of each comparison in the loss; 0 for fillers that give ranks equal work.
        images: the images of each comparison.
    """

    input_ids: Tensor
    layout: AttentionLayout
    scored: Tensor
    targets: Tensor
    response_of: Tensor
    lengths: Tensor
    weights: Tensor
    images: tuple[tuple[ImageTensors, ...], ...]

    @classmethod
    def build(cls, comparisons: Sequence[TokenizedComparison], weights: Sequence[float] | None = None) -> PackedBatch:
        """Lay out ``comparisons`` one after the other.

        Raises:
            ValueError: there are no comparisons, or not one weight for each.
        """
        if not comparisons:
            raise ValueError("a batch needs at least one comparison")
        weights = [1.0] * len(comparisons) if weights is None else list(weights)
        if len(weights) != len(comparisons):
            raise ValueError(f"{len(comparisons)} comparisons, but {len(weights)} weights")
        spans = tuple(c.span for c in comparisons)
        layout = AttentionLayout(spans)
        parts = (part for c in comparisons for part in (c.prompt_ids, *c.response_ids))
        ids = torch.from_numpy(np.fromiter(chain.from_iterable(parts), np.int64, layout.total))
        prompts = torch.tensor([span.prompt for span in spans for _ in span.responses])
        sizes = torch.tensor([size for span in spans for size in span.responses])
        # where each response token is among the segments' keys, and which response it belongs to
        position = ranges((layout.index.cu_seqlens_k[:-1] + prompts).numpy(), sizes.numpy())
        response_of = torch.repeat_interleave(sizes)
        if any(c.scored is not None for c in comparisons):
            masks = (c.scored or [[True] * len(response) for response in c.response_ids] for c in comparisons)
            mask = torch.tensor(list(chain.from_iterable(chain.from_iterable(masks))))
            position, response_of = position[mask], response_of[mask]
        return cls(
            input_ids=ids,
            layout=layout,
            scored=layout.index.key_index[position - 1],
            targets=ids[layout.index.key_index[position]],
            response_of=response_of,
            lengths=torch.bincount(response_of, minlength=len(sizes)),
            weights=torch.tensor(weights, dtype=torch.float64),
            images=tuple(c.images for c in comparisons),
        )

    @property
    def tokens(self) -> int:
        """Tokens in the batch, ``T``."""
        return self.layout.total

    @property
    def comparisons(self) -> list[TokenizedComparison]:
        """The comparisons that :meth:`build` received, but with all response tokens scored."""
        parts = iter(self.input_ids.split(self.layout.part_sizes))
        return [
            TokenizedComparison(next(parts).tolist(), [next(parts).tolist() for _ in span.responses], images=images)
            for span, images in zip(self.layout.spans, self.images, strict=True)
        ]

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move the batch's tensors to ``device``."""
        device = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            double = tensor.dtype == torch.float64 and device.type == "mps"  # MPS has no float64
            return tensor.to(device, torch.float32 if double else tensor.dtype, non_blocking=True)

        return self._each(move, self.layout.to(device))

    def pin_memory(self) -> PackedBatch:
        """Copy the batch to page-locked memory; called by ``DataLoader``."""
        return self._each(Tensor.pin_memory, self.layout.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor], layout: AttentionLayout) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        images = tuple(
            tuple({name: function(tensor) for name, tensor in image.items()} for image in comparison_images)
            for comparison_images in self.images
        )
        return replace(self, layout=layout, images=images, **tensors)

    def probing(self) -> PackedBatch:
        """Return the batch with a layout that records which attention calls it reaches."""
        return replace(self, layout=replace(self.layout, windows=[]))


@dataclass(frozen=True)
class PaddedRows:
    """The responses of a batch as ``R`` right-padded rows of ``L`` tokens, each with its own copy of the prompt."""

    input_ids: Tensor  # `[R, L]`, padded with token 0, which is masked and never scored
    attention_mask: Tensor  # `[R, L]`
    scored: Tensor  # `[S]` positions in the flattened `[R * L]`, in the order of the packed batch
    images: tuple[tuple[ImageTensors, ...], ...]  # the images of each row

    @classmethod
    def unpack(cls, batch: PackedBatch) -> PaddedRows:
        """Unpack ``batch`` into rows, each with its prompt."""
        sizes = batch.layout.key_sizes
        width = max(sizes)
        device = batch.input_ids.device
        length_of_row = torch.tensor(sizes, device=device)
        mask = torch.arange(width, device=device) < length_of_row[:, None]
        ids = batch.input_ids.new_zeros(len(sizes), width)
        ids[mask] = batch.input_ids[batch.layout.index.key_index]
        scored = batch.response_of * width + batch.layout.index.positions[batch.scored]
        owners = zip(batch.images, batch.layout.spans, strict=True)
        return cls(ids, mask.long(), scored, tuple(images for images, span in owners for _ in span.responses))
