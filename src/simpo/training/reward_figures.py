"""Held-out figures of reward models: how often they are right, for which lengths, and whether they know how often.

A reward model says that one response is better than another with probability ``sigmoid`` of the difference of their
rewards, the margin.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simpo.results import Metric, Stage
from simpo.statistics import Interval, bootstrap_interval, proportion_interval, share_interval
from simpo.training.held_out import ACCURACY, compare_preferences
from simpo.training.scores import Scores

# Of every ordered pair, ``[rows, N]``, the better response less the worse; NaN where a row has fewer.
MARGINS, LENGTHS = "pair_margins", "pair_length_differences"
_BINS = 5  # of confidence, from 0.5 to 1


def compare_rewards(before: Scores, after: Scores) -> list[Metric]:
    """Means over the rows, the accuracy by what is longer, and how far confidence can be believed."""
    metrics = compare_preferences(_of_rows(before), _of_rows(after))
    stages: tuple[tuple[Stage, Scores], ...] = (("before", before), ("after", after))
    for stage, scores in stages:
        margins, lengths = scores[MARGINS], scores[LENGTHS]
        for name, found in [*_by_length(margins, lengths), *_calibration(margins)]:
            metrics.append(Metric(f"eval_{name}", found.value, stage, found.n, found.low, found.high, found.method))
    return metrics


def _of_rows(scores: Scores) -> Scores:
    return {name: values for name, values in scores.items() if values.ndim == 1}


def _by_length(margins: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[str, Interval]]:
    """Accuracy where the better response is the longer one, and where it is the shorter one."""
    for name, about in ((f"{ACCURACY}/chosen_longer", lengths > 0), (f"{ACCURACY}/chosen_shorter", lengths < 0)):
        yield name, _share(margins > 0, about)


def _calibration(margins: np.ndarray) -> Iterator[tuple[str, Interval]]:
    """Brier score, expected calibration error, and the accuracy of those whose confidence is in a bin.

    The Brier score (1950) is the mean of ``(1 - p)**2``: 0 at best, 0.25 for who always says 0.5. The expected
    calibration error is the mean difference of confidence and accuracy over the bins (Guo et al. 2017, arXiv
    1706.04599, equation 3), its rows drawn anew for its interval. Confidence is that in the higher reward.
    """
    there = ~np.isnan(margins)
    wrong = 1 / (1 + np.exp(np.clip(margins, -700, 700)))
    yield "brier", share_interval(np.nanmean(wrong**2, axis=1))
    confidence = np.maximum(wrong, 1 - wrong)
    bins = np.clip((np.nan_to_num(confidence) - 0.5) * 2 * _BINS, 0, _BINS - 1).astype(int)
    right = margins > 0
    in_bin = [there & (bins == number) for number in range(_BINS)]
    sums = [(where * values).sum(1) for where in in_bin for values in (np.nan_to_num(confidence), right)]
    yield "calibration_error", bootstrap_interval(np.stack([*sums, there.sum(1)], axis=1), _error, seed=0)
    for number, where in enumerate(in_bin):
        low = 0.5 + number / (2 * _BINS)
        yield f"calibration/{low:.1f}-{low + 0.5 / _BINS:.1f}", _share(right, where)


def _error(sums: np.ndarray) -> np.ndarray:
    """``[...]`` errors from sums ``[..., 2 * bins + 1]``: confidence and right ones of each bin, and all pairs."""
    confident, right = sums[..., :-1:2], sums[..., 1:-1:2]
    return np.abs(confident - right).sum(-1) / sums[..., -1]


def _share(right: np.ndarray, about: np.ndarray) -> Interval:
    """Of the pairs ``about``, ``[rows, N]``, those that are ``right``; pairs of one row are not independent."""
    n = int(about.sum())
    if not n:
        return Interval(np.nan, None, None, 0, "")
    if about.shape[1] == 1:
        return proportion_interval(int((right & about).sum()), n)
    rows = about.any(1)
    counts = about[rows].sum(1)
    found = share_interval((right & about)[rows].sum(1) / counts, counts)
    return Interval(found.value, found.low, found.high, n, found.method)
