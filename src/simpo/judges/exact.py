"""The tiny world's exact judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from simpo.errors import SimpoError
from simpo.judges.protocol import Answers
from simpo.world.judge import judge


class ExactScorer:
    """Scores answers to questions of the tiny world, from 0 to 10; see :func:`simpo.world.judge.judge`."""

    identity: ClassVar[dict[str, Any]] = {"judge": "exact"}

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """The exact judge's scores.

        Raises:
            SimpoError: a prompt is not a question of the world.
        """
        return [_scores(row) for row in rows]


def _scores(row: Answers) -> list[float]:
    try:
        return [judge(row.prompt, response) for response in row.responses]
    except SimpoError as error:
        raise SimpoError(f"exact: prompt {row.id}: {error}") from error
