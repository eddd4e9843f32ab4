"""Synthetic comparisons of random words with realistic lengths, for machines without the real data."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from benchmarks.rows import Row


@dataclass(frozen=True)
class Profile:
    """Log-normal lengths in tokens, capped at four times the median.

    Attributes:
        prompt: median prompt length.
        response: median response length without the end-of-text token.
        spread: standard deviation of the log-lengths.
    """

    prompt: int
    response: int
    spread: float

    def scaled(self, factor: float) -> Profile:
        """Return the profile with all lengths multiplied by ``factor``."""
        return Profile(max(1, round(self.prompt * factor)), max(1, round(self.response * factor)), self.spread)


PROFILES = {
    "hh": Profile(prompt=105, response=30, spread=0.7),  # prompts longer than answers
    "ultrafeedback": Profile(prompt=90, response=260, spread=0.6),  # short prompts, long answers
    "documents": Profile(prompt=4096, response=200, spread=0.05),
}


def synthetic_rows(profile: Profile, count: int, responses: int, words: int) -> list[Row]:
    """Return ``count`` comparisons of random words; every word is one token.

    Args:
        profile: distribution of the lengths.
        count: number of comparisons.
        responses: responses per prompt, ``K``.
        words: number of distinct words (``w0``, ``w1``, ...).
    """
    source = random.Random(0)  # noqa: S311 - words, not secrets

    def text(median: int) -> str:
        size = min(4 * median, math.ceil(median * source.lognormvariate(0.0, profile.spread)))
        return "".join(f" w{source.randrange(words)}" for _ in range(size))

    return [Row(text(profile.prompt), tuple(text(profile.response) for _ in range(responses))) for _ in range(count)]
