"""Several annotators as one: the weighted sum of their scores, normalized among a prompt's answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from simpo.client import Estimate, Usage
from simpo.judging.protocol import Answers, Scorer
from simpo.judging.settings import Normalization

Scores = Sequence[Sequence[float | None]]


def normalize(scores: Sequence[float], how: Normalization) -> list[float]:
    """The scores of one prompt's answers on a scale that different annotators share.

    Args:
        scores: one finite score per answer.
        how: ``none`` leaves them; ``zscore`` subtracts their mean and divides by their standard deviation (``n - 1``),
            as GRPO does with each of several rewards in GDPO (Liu et al. 2026, arXiv 2601.05242); ``rank`` is the share
            of the other answers that an answer is better than, ties counted half, which is Borda's count.

    Returns:
        One number per answer; where scores do not differ, 0 by ``zscore`` and 0.5 by ``rank``.
    """
    if how == "none":
        return list(scores)
    others = len(scores) - 1
    if how == "zscore":
        mean, deviation = fmean(scores), stdev(scores) if others else 0.0
        return [(score - mean) / deviation if deviation else 0.0 for score in scores]
    if not others:
        return [0.5]
    return [(sum(two < one for two in scores) + (sum(two == one for two in scores) - 1) / 2) / others for one in scores]


class CombinedScorer(Scorer):
    """Scores an answer with the weighted sum of several scorers' normalized scores.

    An answer that one of the scorers leaves without a score has none, and the other answers to the prompt are
    normalized as if it were not there.
    """

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float], how: Normalization) -> None:
        """Combine ``scorers`` with ``weights``, both by scorer; for ``how``, see :func:`normalize`."""
        self._scorers, self._weights, self._how = scorers, weights, how

    @property
    def scorers(self) -> list[Scorer]:
        """The scorers, each on its own."""
        return list(self._scorers.values())

    @property
    def identity(self) -> dict[str, Any]:
        """The normalization, and every scorer's weight and identity."""
        found = {"judge": "combined", "normalization": self._how}
        for name, scorer in self._scorers.items():
            found |= {
                f"{name}/{key}": value for key, value in ({"weight": self._weights[name]} | scorer.identity).items()
            }
        return found

    @property
    def usage(self) -> Usage | None:
        """The requests of the scorer that uses a server, of which there is at most one; None if there is none."""
        return next((scorer.usage for scorer in self._scorers.values() if scorer.usage is not None), None)

    def prepare(self) -> None:
        """Prepare all scorers."""
        for scorer in self._scorers.values():
            scorer.prepare()

    def check(self, rows: Sequence[Answers]) -> None:
        """Check the rows for all scorers."""
        for scorer in self._scorers.values():
            scorer.check(rows)

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """The requests of all scorers."""
        return sum((scorer.estimate(rows) for scorer in self._scorers.values()), Estimate())

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """The combined scores."""
        return self.combine(self.score_each(rows))

    def score_each(self, rows: Sequence[Answers]) -> dict[str, Scores]:
        """Every scorer's own scores, by its name."""
        return {name: scorer.score(rows) for name, scorer in self._scorers.items()}

    def combine(self, each: Mapping[str, Scores]) -> list[list[float | None]]:
        """The combined scores, from those of :meth:`score_each`; a score that is not finite counts as missing."""
        weights = [self._weights[name] for name in each]
        return [
            self._combine_answers(list(zip(*own, strict=True)), weights) for own in zip(*each.values(), strict=True)
        ]

    def _combine_answers(
        self, answers: Sequence[Sequence[float | None]], weights: Sequence[float]
    ) -> list[float | None]:
        """The combined scores of one prompt; ``answers`` has, for each answer, its scores by all scorers."""
        complete = [k for k, scores in enumerate(answers) if all(x is not None and math.isfinite(x) for x in scores)]
        combined: list[float | None] = [None] * len(answers)
        if complete:
            columns = [normalize(column, self._how) for column in zip(*(answers[k] for k in complete), strict=True)]  # type: ignore[arg-type]
            for k, scores in zip(complete, zip(*columns, strict=True), strict=True):
                # fsum rounds once, so that the order of the annotators has no effect
                combined[k] = math.fsum(weight * score for weight, score in zip(weights, scores, strict=True))
        return combined


def count_missing(each: Mapping[str, Scores]) -> dict[str, int]:
    """How many answers each scorer left without a score, by the scorer's name."""
    return {
        name: sum(x is None or not math.isfinite(x) for row in scores for x in row) for name, scores in each.items()
    }
