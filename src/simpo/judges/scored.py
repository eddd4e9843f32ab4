"""A scorer as a judge: the higher score wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simpo.judges.protocol import Answers, Pair, Scorer, check_scores


class ScorerJudge:
    """Compares two answers by their scores, which do not depend on the order in which the answers stand."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    @property
    def identity(self) -> dict[str, Any]:
        """The scorer's."""
        return self._scorer.identity

    def margins(self, pairs: Sequence[Pair]) -> list[float]:
        """By how much the score of ``a`` is above that of ``b``.

        Raises:
            SimpoError: as the scorer, or its scores are not numbers.
        """
        rows = [Answers(pair.id, pair.prompt, (pair.a, pair.b)) for pair in pairs]
        scores = self._scorer.score(rows)
        check_scores(scores, rows, str(self.identity["judge"]))
        return [a - b for a, b in scores]

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """1, 0, or half for equal scores.

        Raises:
            SimpoError: as :meth:`margins`.
        """
        return [verdict_of(margin) for margin in self.margins(pairs)]


def verdict_of(margin: float) -> float:
    """Who wins by a margin."""
    return 0.5 if margin == 0 else float(margin > 0)
