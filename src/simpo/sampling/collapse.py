"""Whether a model that is being trained still answers: figures of its answers, and bounds against the start model's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from simpo.sampling.engine import Sampled

# Bounds of ours, wide enough for what good training does to answers; see docs/metrics.md.
_SHARE = 0.5  # of the start's end-of-turn rate and distinct-2
_LEAST_FALL = 0.25  # of the end-of-turn rate, so that one answer of a few is not enough
_TIMES = 2.0  # the longer of the start's answers and the held-out responses


@dataclass(frozen=True)
class AnswerFigures:
    """Figures of one answer to each of several prompts.

    Attributes:
        length: mean number of tokens, the one that ended the answer included.
        end_of_turn_rate: share of answers that ended by themselves.
        distinct_2: share of an answer's pairs of neighbouring tokens that are different ones (distinct-n with n = 2:
            Li et al. 2016, arXiv 1510.03055), each answer by itself, mean over the answers that have such a pair; NaN
            if none has.
    """

    length: float
    end_of_turn_rate: float
    distinct_2: float

    @classmethod
    def of(cls, answers: Sequence[Sampled]) -> AnswerFigures:
        """Of at least one answer."""
        bigrams = [list(pairwise(answer.ids)) for answer in answers if len(answer.ids) > 1]
        return cls(
            sum(len(answer.ids) for answer in answers) / len(answers),
            sum(answer.finished for answer in answers) / len(answers),
            sum(len(set(found)) / len(found) for found in bigrams) / len(bigrams) if bigrams else math.nan,
        )

    def line(self) -> str:
        """In words."""
        return ", ".join(f"{name} {value:.4g}" for name, value in dataclasses.asdict(self).items())


def signs_of_collapse(now: AnswerFigures, start: AnswerFigures, expected_length: float) -> list[str]:
    """Figures that are out of bounds, each in words; none for a model that answers as before, or better.

    Args:
        now: of the model in training.
        start: of the model that training started from, on the same prompts.
        expected_length: mean tokens of the held-out responses, which fine-tuning may well lengthen answers to.
    """
    fall = start.end_of_turn_rate - now.end_of_turn_rate
    out_of_bounds = {
        "end_of_turn_rate": now.end_of_turn_rate < _SHARE * start.end_of_turn_rate and fall > _LEAST_FALL,
        "length": now.length > _TIMES * max(start.length, expected_length),
        "distinct_2": now.distinct_2 < _SHARE * start.distinct_2,
    }
    return [
        f"{name} {getattr(start, name):.3g} -> {getattr(now, name):.3g}" for name, out in out_of_bounds.items() if out
    ]
