"""Scores of battles against a baseline, and how sure they are.

The benchmark fits Bradley-Terry strengths by unpenalised logistic regression. Every battle has the baseline on one
side, so that a model's fitted chance to win is the mean worth of its battles, which is what is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simpo.evaluation.arena_hard.verdicts import Version
from simpo.statistics import Interval, share_interval

_ROUNDS = 100
_PERCENTILES: dict[Version, tuple[float, float]] = {"v0.1": (2.5, 97.5), "v2": (5, 95)}


def score(prompts: Sequence[Sequence[float]], version: Version, seed: int = 42) -> Interval:
    """The benchmark's score in percent and its bootstrap interval.

    Battles are drawn one by one, those of one prompt and the three of a strong verdict too, as if they were
    independent. That makes the interval narrower than its name says; :func:`score_over_prompts` is the one to trust.
    v0.1 has the mean of the battles and the 2.5th and 97.5th percentile, v2 the mean of the bootstrap means and the
    5th and 95th.

    Args:
        prompts: the worths of each prompt's battles.
        version: of the benchmark.
        seed: of the bootstrap.
    """
    worths = np.concatenate([np.asarray(worths, dtype=np.float64) for worths in prompts])
    draws = np.random.default_rng(seed).integers(len(worths), size=(_ROUNDS, len(worths)))
    means = worths[draws].mean(axis=1)
    percentiles = _PERCENTILES[version]
    low, high = np.percentile(means, percentiles)
    value = worths.mean() if version == "v0.1" else means.mean()
    method = "bootstrap of battles, {:g} to {:g}%".format(*percentiles)
    return Interval(100 * float(value), 100 * float(low), 100 * float(high), len(prompts), method)


def score_over_prompts(prompts: Sequence[Sequence[float]]) -> Interval:
    """The mean worth of the battles in percent, with a 95% interval that takes a prompt as one observation.

    Args:
        prompts: the worths of each prompt's battles, at least one each.
    """
    found = share_interval([float(np.mean(worths)) for worths in prompts], [len(worths) for worths in prompts])
    low, high = (None if bound is None else 100 * bound for bound in (found.low, found.high))
    return Interval(100 * found.value, low, high, found.n, f"over prompts: {found.method}")
