"""A judge of pairs as a scorer: every answer to a prompt meets every other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from simpo.client import Estimate, Usage
from simpo.judges.pairwise import PairwiseApiJudge
from simpo.judges.protocol import Answers, Pair


class TournamentScorer:
    """Scores an answer with its mean probability of winning against the prompt's other answers, from 0 to 1.

    A meeting without a verdict does not count; an answer without any verdict has no score. A lone answer has none.
    """

    def __init__(self, judge: PairwiseApiJudge) -> None:
        self._judge = judge

    @property
    def identity(self) -> dict[str, Any]:
        """The judge's."""
        return {**self._judge.identity, "judge": "api"}

    @property
    def usage(self) -> Usage:
        """What the judge has sent so far."""
        return self._judge.client.usage

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """What :meth:`score` would send."""
        return self._judge.estimate([pair for row in rows for pair in _meetings(row)])

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """Mean win probabilities.

        Raises:
            SimpoError: as the judge.
        """
        verdicts = iter(self._judge.compare([pair for row in rows for pair in _meetings(row)]))
        return [_means(len(row.responses), [next(verdicts) for _ in _meetings(row)]) for row in rows]


def _meetings(row: Answers) -> list[Pair]:
    return [
        Pair(f"{row.id}/{i}-{j}", row.prompt, row.responses[i], row.responses[j], row.context)
        for i, j in combinations(range(len(row.responses)), 2)
    ]


def _means(count: int, verdicts: Sequence[float | None]) -> list[float | None]:
    """Of every answer, from the verdicts on all meetings."""
    won: list[list[float]] = [[] for _ in range(count)]
    for (i, j), verdict in zip(combinations(range(count), 2), verdicts, strict=True):
        if verdict is not None:
            won[i].append(verdict)
            won[j].append(1 - verdict)
    return [sum(shares) / len(shares) if shares else None for shares in won]
