"""The lengths of packed comparisons, and the same in integer tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Span(NamedTuple):
    """Lengths, in tokens, of one comparison's parts."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens of the whole comparison."""
        return self.prompt + sum(self.responses)


class LayoutIndex(NamedTuple):
    """A layout in integer tensors: all that kernels and compiled graphs look at.

    Attributes:
        sizes: for every comparison ``K``, then the lengths of its prompt and ``K`` responses; stays on the CPU.
        positions: ``[T]`` position of a token in ``prompt ++ its response``.
        comparison_of: ``[T]`` which comparison a token belongs to.
        part_of: ``[T]`` 0 for a prompt's token, k + 1 for one of response k.
        key_index: ``[sum(key_sizes)]`` flat positions of all segments' keys, one segment after the other.
        cu_seqlens_q: ``[segments + 1]`` int32 cumulative query lengths.
        cu_seqlens_k: ``[segments + 1]`` int32 cumulative key lengths.
    """

    sizes: Tensor
    positions: Tensor
    comparison_of: Tensor
    part_of: Tensor
    key_index: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span]) -> LayoutIndex:
        """Of comparisons with these lengths, on the CPU."""
        parts = np.array([size for span in spans for size in (span.prompt, *span.responses)])
        counts = np.array([1 + len(span.responses) for span in spans])  # parts of each comparison
        first = np.cumsum(counts) - counts  # each comparison's prompt, as a part
        starts = np.cumsum(parts) - parts
        part_of = np.arange(len(parts)) - np.repeat(first, counts)
        comparison_of = np.repeat(np.arange(len(spans)), counts)
        # where a part starts in ``prompt ++ response``: 0 for a prompt, after its prompt for a response
        offsets = np.where(part_of == 0, 0, parts[first][comparison_of])
        responses = np.flatnonzero(part_of)  # the segments, as parts
        prompts = first[comparison_of[responses]]
        keys = np.stack([prompts, responses], axis=1).ravel()  # the parts that the segments' keys are
        first_of_its_prompt = part_of[responses] == 1
        return cls(
            sizes=torch.tensor(
                [size for span in spans for size in (len(span.responses), span.prompt, *span.responses)]
            ),
            positions=ranges(offsets, parts),
            comparison_of=torch.from_numpy(np.repeat(comparison_of, parts)),
            part_of=torch.from_numpy(np.repeat(part_of, parts)),
            key_index=ranges(starts[keys], parts[keys]),
            cu_seqlens_q=_cumulative(parts[responses] + first_of_its_prompt * parts[prompts]),
            cu_seqlens_k=_cumulative(parts[responses] + parts[prompts]),
        )

    def to(self, device: torch.device) -> LayoutIndex:
        """The tensors on ``device``, but for ``sizes``."""
        sizes, *others = self
        return LayoutIndex(sizes, *(tensor.to(device, non_blocking=True) for tensor in others))

    def pin_memory(self) -> LayoutIndex:
        """The tensors in page-locked memory."""
        return LayoutIndex(*(tensor.pin_memory() for tensor in self))


def ranges(starts: np.ndarray, sizes: np.ndarray) -> Tensor:
    """``[sum(sizes)]`` ranges of these starts and sizes, one after the other."""
    before = np.cumsum(sizes) - sizes
    return torch.from_numpy(np.arange(sizes.sum()) + np.repeat(starts - before, sizes))


def _cumulative(sizes: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
