"""Ordered pairs against two nested loops."""

from __future__ import annotations

import pytest
import torch

from simpo.training.batches import OrderedPairs

COUNTS = [2, 4, 1, 3]
SCORES = [2.0, 1.0, 5.0, 5.0, 3.0, 0.0, 1.0, 2.0, 2.0, 1.0]


def naive(counts: list[int], scores: list[float]) -> list[tuple[int, int, int]]:
    found, start = [], 0
    for comparison, count in enumerate(counts):
        numbers = range(start, start + count)
        found += [(a, b, comparison) for a in numbers for b in numbers if scores[a] > scores[b]]
        start += count
    return found


@pytest.mark.parametrize("scored", [True, False])
def test_every_response_is_paired_with_every_worse_one(scored):
    scores = SCORES if scored else [float(-n) for n in range(len(SCORES))]  # without scores, order decides
    pairs = OrderedPairs.of(torch.tensor(COUNTS), torch.tensor(scores) if scored else None)
    expected = naive(COUNTS, scores)
    assert list(zip(*(part.tolist() for part in pairs[:3]), strict=True)) == expected
    assert pairs.best.tolist() == [0, 2, 6, 7]
    values = torch.rand(len(expected), 2, dtype=torch.float64, requires_grad=True)
    means = pairs.mean(values)
    for comparison in (0, 1, 3):
        own = [number for number, (_, _, of) in enumerate(expected) if of == comparison]
        torch.testing.assert_close(means[comparison], values[own].mean(dim=0))
    assert means[2].tolist() == [0, 0]  # a single response has no pairs
    torch.testing.assert_close(pairs.mean(values[:, 0]), means[:, 0])


def test_pairs_are_left_unchanged():
    """Bit for bit: one ordered pair per comparison, in batch order."""
    pairs = OrderedPairs.of(torch.full((5,), 2))
    assert pairs.better.tolist() == [0, 2, 4, 6, 8]
    assert pairs.worse.tolist() == [1, 3, 5, 7, 9]
    values = torch.randn(5)
    assert torch.equal(pairs.mean(values), values)
