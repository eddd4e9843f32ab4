"""Comparisons of random words whose lengths are like those of real data, for machines without the data."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from benchmarks.rows import Row


@dataclass(frozen=True)
class Profile:
    """Log-normal lengths in tokens, cut at four times the median.

    Attributes:
        prompt: median length of a prompt.
        response: median length of a response, its end-of-text token not counted.
        spread: standard deviation of the logarithms of both.
    """

    prompt: int
    response: int
    spread: float

    def scaled(self, factor: float) -> Profile:
        """All lengths times ``factor``."""
        return Profile(max(1, round(self.prompt * factor)), max(1, round(self.response * factor)), self.spread)


PROFILES = {
    "hh": Profile(prompt=105, response=30, spread=0.7),  # shared prompts longer than the answers
    "ultrafeedback": Profile(prompt=90, response=260, spread=0.6),  # short prompts, long answers
    "documents": Profile(prompt=4096, response=200, spread=0.05),
}


def made_up_rows(profile: Profile, count: int, responses: int, words: int) -> list[Row]:
    """``count`` comparisons of ``responses`` responses each; every word is one token.

    Args:
        profile: the lengths.
        count: how many.
        responses: to each prompt, ``K``.
        words: number of different words, ``w0`` and so on.
    """
    source = random.Random(0)  # noqa: S311 - words, not secrets

    def text(median: int) -> str:
        size = min(4 * median, math.ceil(median * source.lognormvariate(0.0, profile.spread)))
        return "".join(f" w{source.randrange(words)}" for _ in range(size))

    return [Row(text(profile.prompt), tuple(text(profile.response) for _ in range(responses))) for _ in range(count)]
