"""The best-of-N estimate against an explicit loop over all subsets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from benchmarks.best_of_n import best_of_n, best_of_n_kl


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_the_estimate_equals_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    chosen_by, measured_by = rng.normal(size=(4, 7)), rng.normal(size=(4, 7))
    for first, second, found in zip(chosen_by, measured_by, best_of_n(chosen_by, measured_by, n), strict=True):
        best = [second[max(subset, key=lambda place: first[place])] for subset in combinations(range(7), n)]
        assert found == pytest.approx(np.mean(best), rel=1e-12)


def test_large_n_and_ties():
    """64 answers have more subsets than fit into a 64-bit integer; ties can be broken either way."""
    scores = np.random.default_rng(0).integers(0, 4, size=(3, 64)).astype(float)
    for n in (1, 8, 32, 64):
        expected = [
            sum(1 - (np.mean(row < level) if n == 1 else _none_above(row, level, n)) for level in (1, 2, 3))
            for row in scores
        ]
        assert best_of_n(scores, scores, n) == pytest.approx(expected, rel=1e-9)


def _none_above(row, level, n):
    """Return the probability that no answer in a subset reaches ``level``."""
    below, chance = int((row < level).sum()), 1.0
    for drawn in range(n):
        chance *= max(0, below - drawn) / (len(row) - drawn)
    return chance


def test_the_kl_bound_matches_its_formula():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(64) == pytest.approx(np.log(64) - 63 / 64)
