"""The comparisons of each optimizer step, and how they are split over ranks and micro-batches.

Every rank computes the same plan from (seed, epoch, step, lengths), without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simpo.errors import SimpoError


class MicroBatch(NamedTuple):
    """The rows of one forward, and their weights in the loss (0 for a filler)."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]


class Step(NamedTuple):
    """One rank's share of an optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    weight: float  # of all rows of all ranks: the loss's denominator


@dataclass(frozen=True)
class StepPlan:
    """The plan of a run.

    Attributes:
        lengths: ``[rows]`` tokens of each row.
        rows_per_step: pairs per optimizer step, over all ranks; the last step of an epoch may have fewer.
        max_batch_tokens: no micro-batch has more tokens than this.
        world_size: number of ranks.
        seed: with the epoch, determines the order of the rows; None keeps their order.
        drop_last: leave out an incomplete last step.
        padded_rows: ``[rows]`` number of padded rows of each, if micro-batches are padded; None if they are packed.
        weights: ``[rows]`` weight of each in its step's mean, such as its scored tokens; None for equal weights.

    Raises:
        SimpoError: a row is longer than ``max_batch_tokens``.
    """

    lengths: np.ndarray
    rows_per_step: int
    max_batch_tokens: int
    world_size: int = 1
    seed: int | None = None
    drop_last: bool = False
    padded_rows: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_budget(self.lengths, self.max_batch_tokens)

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
        rows = order[number * self.rows_per_step : (number + 1) * self.rows_per_step]
        shares = _balance(rows, self.lengths, self.world_size)
        tokens = max(int(self.lengths[np.array(share, dtype=int)].sum()) for share in shares)
        count = max(1, -(-tokens // self.max_batch_tokens))
        while max(map(self._largest, shares, [count] * len(shares))) > self.max_batch_tokens:
            count += 1
        filler = int(rows[np.argmin(self.lengths[rows])])
        micro_batches = []
        for members in _balance(np.array(shares[rank], dtype=int), self.lengths, count):
            if members:
                micro_batches.append(MicroBatch(tuple(members), tuple(self._weights(members).tolist())))
            else:  # this rank has less to do, but every rank must make the same number of forwards
                micro_batches.append(MicroBatch((filler,), (0.0,)))
        return Step(tuple(micro_batches), float(self._weights(rows).sum()))

    def _weights(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.ones(len(rows)) if self.weights is None else self.weights[np.asarray(rows)].astype(float)

    def _largest(self, share: Sequence[int], count: int) -> int:
        """Tokens of the largest micro-batch if a rank's ``share`` is split in ``count``."""
        groups = _balance(np.array(share, dtype=int), self.lengths, count)
        return max(_tokens(group, self.lengths, self.padded_rows) for group in groups)


def check_budget(lengths: Sequence[int] | np.ndarray, max_batch_tokens: int) -> None:
    """Raise :class:`SimpoError` naming the longest row if it does not fit into a micro-batch."""
    longest = int(np.argmax(lengths)) if len(lengths) else 0
    if len(lengths) and lengths[longest] > max_batch_tokens:
        raise SimpoError(
            f"max_batch_tokens: {max_batch_tokens} is below the longest comparison (row {longest}, "
            f"{lengths[longest]} tokens); raise it or lower max_length"
        )


def fill_in_order(
    lengths: Sequence[int], max_batch_tokens: int, padded_rows: Sequence[int] | None = None
) -> list[range]:
    """Consecutive runs of comparisons of at most ``max_batch_tokens`` tokens each, in their order.

    Arguments and errors are those of :class:`StepPlan`.
    """
    check_budget(lengths, max_batch_tokens)
    sizes, runs, start = np.asarray(lengths), [], 0
    padded = None if padded_rows is None else np.asarray(padded_rows)
    for row in range(len(sizes)):
        if _tokens(range(start, row + 1), sizes, padded) > max_batch_tokens:
            runs.append(range(start, row))
            start = row
    return [*runs, range(start, len(sizes))] if len(sizes) else []


def _tokens(members: Sequence[int], lengths: np.ndarray, padded_rows: np.ndarray | None) -> int:
    """Tokens of a forward of ``members``: their sum, or all rows as wide as the widest."""
    index = np.array(members, dtype=int)
    if padded_rows is None or not len(index):
        return int(lengths[index].sum())
    return int(padded_rows[index].sum() * (lengths[index] // padded_rows[index]).max())


def _balance(rows: np.ndarray, lengths: np.ndarray, bins: int) -> list[list[int]]:
    """Rows in ``bins`` groups of about as many tokens: longest first, each to the lightest group."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    loads = np.zeros(bins, dtype=np.int64)
    for row in sorted(rows.tolist(), key=lambda row: (-lengths[row], row)):
        lightest = int(np.argmin(loads))
        groups[lightest].append(row)
        loads[lightest] += lengths[row]
    return groups
