"""Plans which comparisons each optimizer step uses, and splits them across ranks and micro-batches.

Every rank computes the same plan from (seed, epoch, step, lengths), without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from simpo.errors import SimpoError

# Tokens per micro-batch if ``max_batch_tokens`` is not set; docs/performance.md gives the reasons.
_ACCELERATOR_TOKENS, _CPU_TOKENS = 16384, 2048


def default_batch_tokens(longest: int, *, cpu: bool) -> int:
    """Return the default of ``max_batch_tokens``, given the number of tokens in the longest row."""
    return max(_CPU_TOKENS if cpu else _ACCELERATOR_TOKENS, longest)


class MicroBatch(NamedTuple):
    """The rows of one forward, and their weights in the loss (0 for a filler row)."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]


class Step(NamedTuple):
    """One rank's share of an optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    weight: float  # total over the rows of all ranks: the denominator of the loss


@dataclass(frozen=True)
class RowSizes:
    """How many tokens rows take up in a forward, on their own and batched together.

    A batch consists of rectangles: each row adds lines to each rectangle, and the widest line determines its width. A
    packed batch is a single column of tokens, a padded batch is one rectangle of responses with their prompts, and a
    cached batch is one rectangle of prompts and one of responses.
    """

    lines: np.ndarray  # `[rows, rectangles]` number of lines a row adds
    widths: np.ndarray  # `[rows, rectangles]` tokens in each of those lines

    @classmethod
    def of(
        cls, path: str, prompts: np.ndarray, counts: np.ndarray, longest: np.ndarray, packed: np.ndarray
    ) -> RowSizes:
        """Compute the sizes of rows on a given path.

        Args:
            path: ``"packed"``, ``"cached"`` or ``"padded"``.
            prompts: ``[rows]`` tokens in the prompt.
            counts: ``[rows]`` number of responses, ``K``.
            longest: ``[rows]`` tokens in the longest response.
            packed: ``[rows]`` tokens in the whole row, with a shared prompt.
        """
        if path == "packed":
            return cls.unpadded(packed)
        if path == "cached":
            return cls(np.stack([np.ones_like(counts), counts], axis=1), np.stack([prompts, longest], axis=1))
        return cls(counts[:, None], (prompts + longest)[:, None])

    @classmethod
    def unpadded(cls, lengths: np.ndarray) -> RowSizes:
        """Return the sizes of rows with these ``lengths``, ``[rows]``, in batches without padding."""
        return cls(lengths[:, None], np.ones_like(lengths)[:, None])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row on its own, ``[rows]``."""
        return (self.lines * self.widths).sum(axis=1)

    @property
    def pads(self) -> bool:
        """Whether rows of different widths waste tokens."""
        return bool((self.widths > 1).any())

    def batch_tokens(self, rows: Sequence[int]) -> int:
        """Return the number of tokens in a forward of these rows."""
        index = np.array(rows, dtype=int)
        return int((self.lines[index].sum(axis=0) * self.widths[index].max(axis=0, initial=0)).sum())


@dataclass(frozen=True)
class StepPlan:
    """The batching plan of a run.

    Raises:
        SimpoError: a row is longer than ``max_batch_tokens``.
    """

    sizes: RowSizes  # how many tokens the rows take up
    rows_per_step: int  # rows per optimizer step, over all ranks; the last step of an epoch may have fewer
    max_batch_tokens: int  # upper bound on the tokens of a micro-batch
    world_size: int = 1  # number of ranks
    seed: int | None = None  # determines the order of the rows, together with the epoch; None keeps their order
    drop_last: bool = False  # whether to drop an incomplete last step
    # `[rows]` weight of each row in the mean over its step, such as its scored tokens; None for equal weights.
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_budget(self.lengths, self.max_batch_tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row on its own, ``[rows]``."""
        return self.sizes.lengths

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        full, rest = divmod(len(self.lengths), self.rows_per_step)
        return full + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the rows in an epoch, ``[rows]``."""
        if self.seed is None:
            return np.arange(len(self.lengths))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))

    def step(self, order: np.ndarray, number: int, rank: int = 0) -> Step:
        """Return a rank's share of step ``number`` in the epoch with row order ``order``."""
        return self.steps_of_all_ranks(order, number)[rank]

    def steps_of_all_ranks(self, order: np.ndarray, number: int) -> list[Step]:
        """Return the shares of all ranks in a step; see :meth:`step`."""
        rows = order[number * self.rows_per_step : (number + 1) * self.rows_per_step]
        shares = [np.array(share, dtype=int) for share in _balance(rows, self.lengths, self.world_size)]
        # ranks must run equally many forwards, so a rank with less to do adds a row of weight 0
        filler = MicroBatch((int(rows[np.argmin(self.lengths[rows])]),), (0.0,))
        total = float(self._weights(rows).sum())

        def micro_batch(members: list[int]) -> MicroBatch:
            return MicroBatch(tuple(members), tuple(self._weights(members).tolist())) if members else filler

        return [Step(tuple(map(micro_batch, groups)), total) for groups in self._split(shares)]

    def _weights(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.ones(len(rows)) if self.weights is None else self.weights[np.asarray(rows)].astype(float)

    def _split(self, shares: list[np.ndarray]) -> list[list[list[int]]]:
        """Split each rank's rows into micro-batches, equally many on every rank; some may be empty."""
        if self.sizes.pads:  # batch rows of similar widths together, so that little is padded
            widths = self.sizes.widths.sum(axis=1)
            by_width = [sorted(share.tolist(), key=lambda row: (-int(widths[row]), row)) for share in shares]
            groups = [fill(self.sizes, rows, self.max_batch_tokens) for rows in by_width]
            largest = max(map(len, groups))
            return [[*group, *([] for _ in range(largest - len(group)))] for group in groups]
        count = max(1, -(-max(int(self.lengths[share].sum()) for share in shares) // self.max_batch_tokens))
        while True:
            groups = [_balance(share, self.lengths, count) for share in shares]
            if max(self.sizes.batch_tokens(rows) for group in groups for rows in group) <= self.max_batch_tokens:
                return groups
            count += 1


def check_budget(lengths: Sequence[int] | np.ndarray, max_batch_tokens: int) -> None:
    """Raise :class:`SimpoError`, naming the longest row, if it does not fit into a micro-batch."""
    longest = int(np.argmax(lengths)) if len(lengths) else 0
    if len(lengths) and lengths[longest] > max_batch_tokens:
        raise SimpoError(
            f"max_batch_tokens: {max_batch_tokens} is too small for the longest comparison (row {longest}, "
            f"{lengths[longest]} tokens); raise it or lower max_length"
        )


def fill(sizes: RowSizes, rows: Iterable[int], max_batch_tokens: int) -> list[list[int]]:
    """Split ``rows``, in order, into consecutive groups of at most ``max_batch_tokens`` tokens each."""
    check_budget(sizes.lengths, max_batch_tokens)
    groups: list[list[int]] = []
    for row in rows:
        if groups and sizes.batch_tokens([*groups[-1], row]) <= max_batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _balance(rows: np.ndarray, lengths: np.ndarray, bins: int) -> list[list[int]]:
    """Split rows into ``bins`` groups of similar token counts, greedily: longest first, each to the lightest group."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    loads = np.zeros(bins, dtype=np.int64)
    for row in sorted(rows.tolist(), key=lambda row: (-lengths[row], row)):
        lightest = int(np.argmin(loads))
        groups[lightest].append(row)
        loads[lightest] += lengths[row]
    return groups
