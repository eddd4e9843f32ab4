"""The comparisons of each optimizer step, and how they are split over ranks and micro-batches.

Every rank computes the same plan from (seed, epoch, step, lengths), without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from simpo.errors import SimpoError

# Tokens of a micro-batch where ``max_batch_tokens`` is not set; docs/performance.md gives the reasons.
_ACCELERATOR_TOKENS, _CPU_TOKENS = 16384, 2048


def default_batch_tokens(longest: int, *, cpu: bool) -> int:
    """Tokens of a micro-batch where ``max_batch_tokens`` is not set and the longest row has ``longest``."""
    return max(_CPU_TOKENS if cpu else _ACCELERATOR_TOKENS, longest)


class MicroBatch(NamedTuple):
    """The rows of one forward, and their weights in the loss (0 for a filler)."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]


class Step(NamedTuple):
    """One rank's share of an optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    weight: float  # total over all rows of all ranks: the loss's denominator


@dataclass(frozen=True)
class RowSizes:
    """The number of tokens that rows take in a forward, one by one and together.

    A batch is one or several rectangles: each row adds lines to each of them, and a rectangle is as wide as its widest
    row. A packed batch is a single column of tokens, a padded one a rectangle of responses with their prompts, and a
    cached one a rectangle of prompts and one of responses.
    """

    lines: np.ndarray  # `[rows, rectangles]` lines that a row adds
    widths: np.ndarray  # `[rows, rectangles]` tokens of such a line

    @classmethod
    def of(
        cls, path: str, prompts: np.ndarray, counts: np.ndarray, longest: np.ndarray, packed: np.ndarray
    ) -> RowSizes:
        """The sizes of rows on a path.

        Args:
            path: ``"packed"``, ``"cached"`` or ``"padded"``.
            prompts: ``[rows]`` tokens of the prompt.
            counts: ``[rows]`` number of responses, ``K``.
            longest: ``[rows]`` tokens of the longest response.
            packed: ``[rows]`` tokens of the whole row with a shared prompt.
        """
        if path == "packed":
            return cls.unpadded(packed)
        if path == "cached":
            return cls(np.stack([np.ones_like(counts), counts], axis=1), np.stack([prompts, longest], axis=1))
        return cls(counts[:, None], (prompts + longest)[:, None])

    @classmethod
    def unpadded(cls, lengths: np.ndarray) -> RowSizes:
        """The sizes of rows of these ``lengths``, ``[rows]``, in batches without padding."""
        return cls(lengths[:, None], np.ones_like(lengths)[:, None])

    @property
    def lengths(self) -> np.ndarray:
        """``[rows]`` tokens of each row on its own."""
        return (self.lines * self.widths).sum(axis=1)

    @property
    def pads(self) -> bool:
        """Whether rows of different widths waste tokens."""
        return bool((self.widths > 1).any())

    def together(self, rows: Sequence[int]) -> int:
        """Tokens of a forward of these rows."""
        index = np.array(rows, dtype=int)
        return int((self.lines[index].sum(axis=0) * self.widths[index].max(axis=0, initial=0)).sum())


@dataclass(frozen=True)
class StepPlan:
    """The plan of a run.

    Raises:
        SimpoError: a row is longer than ``max_batch_tokens``.
    """

    sizes: RowSizes  # tokens of the rows
    rows_per_step: int  # pairs per optimizer step, over all ranks; the last step of an epoch may have fewer
    max_batch_tokens: int  # no micro-batch has more tokens than this
    world_size: int = 1  # number of ranks
    seed: int | None = None  # with the epoch, determines the order of the rows; None keeps their order
    drop_last: bool = False  # leave out an incomplete last step
    # `[rows]` weight of each in its step's mean, such as its scored tokens; None for equal weights.
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_budget(self.lengths, self.max_batch_tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[rows]`` tokens of each row on its own."""
        return self.sizes.lengths

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        full, rest = divmod(len(self.lengths), self.rows_per_step)
        return full + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        """``[rows]`` the order in which an epoch takes the rows."""
        if self.seed is None:
            return np.arange(len(self.lengths))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))

    def step(self, order: np.ndarray, number: int, rank: int = 0) -> Step:
        """Rank ``rank``'s share of step ``number`` of the epoch with row order ``order``."""
        return self.step_of_ranks(order, number)[rank]

    def step_of_ranks(self, order: np.ndarray, number: int) -> list[Step]:
        """The shares of all ranks, as :meth:`step` returns them."""
        rows = order[number * self.rows_per_step : (number + 1) * self.rows_per_step]
        shares = [np.array(share, dtype=int) for share in _balance(rows, self.lengths, self.world_size)]
        # a rank that has less to do makes as many forwards as the others, with a row that counts nothing
        filler = MicroBatch((int(rows[np.argmin(self.lengths[rows])]),), (0.0,))
        total = float(self._weights(rows).sum())

        def micro_batch(members: list[int]) -> MicroBatch:
            return MicroBatch(tuple(members), tuple(self._weights(members).tolist())) if members else filler

        return [Step(tuple(map(micro_batch, groups)), total) for groups in self._split(shares)]

    def _weights(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.ones(len(rows)) if self.weights is None else self.weights[np.asarray(rows)].astype(float)

    def _split(self, shares: list[np.ndarray]) -> list[list[list[int]]]:
        """The rows of every rank's micro-batches, equally many for each; some may be empty."""
        if self.sizes.pads:  # rows of similar widths next to one another, so that little is padded
            widths = self.sizes.widths.sum(axis=1)
            by_width = [sorted(share.tolist(), key=lambda row: (-int(widths[row]), row)) for share in shares]
            groups = [fill(self.sizes, rows, self.max_batch_tokens) for rows in by_width]
            most = max(map(len, groups))
            return [[*group, *([] for _ in range(most - len(group)))] for group in groups]
        count = max(1, -(-max(int(self.lengths[share].sum()) for share in shares) // self.max_batch_tokens))
        while True:
            groups = [_balance(share, self.lengths, count) for share in shares]
            if max(self.sizes.together(rows) for group in groups for rows in group) <= self.max_batch_tokens:
                return groups
            count += 1


def check_budget(lengths: Sequence[int] | np.ndarray, max_batch_tokens: int) -> None:
    """Raise :class:`SimpoError` naming the longest row if it does not fit into a micro-batch."""
    longest = int(np.argmax(lengths)) if len(lengths) else 0
    if len(lengths) and lengths[longest] > max_batch_tokens:
        raise SimpoError(
            f"max_batch_tokens: {max_batch_tokens} is below the longest comparison (row {longest}, "
            f"{lengths[longest]} tokens); raise it or lower max_length"
        )


def fill(sizes: RowSizes, rows: Iterable[int], max_batch_tokens: int) -> list[list[int]]:
    """Consecutive groups of ``rows`` that take at most ``max_batch_tokens`` tokens each, in their order."""
    check_budget(sizes.lengths, max_batch_tokens)
    groups: list[list[int]] = []
    for row in rows:
        if groups and sizes.together([*groups[-1], row]) <= max_batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _balance(rows: np.ndarray, lengths: np.ndarray, bins: int) -> list[list[int]]:
    """Rows in ``bins`` groups of about as many tokens: longest first, each to the lightest group."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    loads = np.zeros(bins, dtype=np.int64)
    for row in sorted(rows.tolist(), key=lambda row: (-lengths[row], row)):
        lightest = int(np.argmin(loads))
        groups[lightest].append(row)
        loads[lightest] += lengths[row]
    return groups
