"""A scorer as a judge: the higher score wins."""

from __future__ import annotations

import json
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
        """By how much the score of ``a`` is above that of ``b``; an answer in several pairs is scored once.

        Raises:
            SimpoError: as the scorer, or its scores are not numbers.
        """
        groups: dict[str, list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(_key(pair), []).append(pair)
        rows = [_answers(group) for group in groups.values()]
        given = self._scorer.score(rows)
        check_scores(given, rows, str(self.identity["judge"]))
        scores = {
            key: dict(zip(row.responses, values, strict=True))
            for key, row, values in zip(groups, rows, given, strict=True)
        }
        return [scores[_key(pair)][pair.a] - scores[_key(pair)][pair.b] for pair in pairs]

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """1, 0, or half for equal scores.

        Raises:
            SimpoError: as :meth:`margins`.
        """
        return [verdict_of(margin) for margin in self.margins(pairs)]


def _key(pair: Pair) -> str:
    return json.dumps([pair.prompt, pair.context.columns])


def _answers(group: Sequence[Pair]) -> Answers:
    """The different answers of the pairs of one prompt."""
    texts = dict.fromkeys(text for pair in group for text in (pair.a, pair.b))
    return Answers(group[0].id, group[0].prompt, tuple(texts), group[0].context)


def verdict_of(margin: float) -> float:
    """Who wins by a margin."""
    return 0.5 if margin == 0 else float(margin > 0)
