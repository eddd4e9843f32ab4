"""The benchmark for scoring answers: its FLOP counts, and a run."""

from __future__ import annotations

import pytest
from benchmarks.arithmetic import Shape
from benchmarks.score_answers import KINDS, allowed_ratio, make_comparison, make_scorer, measure, split_by_answer
from benchmarks.setting import Setting

SHAPE = Shape(hidden=8, layers=2, heads=2, kv_heads=1, head_size=4, intermediate=16, vocabulary=32)


def naive_flops(sequences: list[tuple[int, int]], scored: int) -> int:
    """Return the FLOPs for sequences of ``(queries, keys)`` and ``scored`` rows of the head, product by product."""
    tokens = sum(queries for queries, _ in sequences)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    attention = sum(2 * 2 * 2 * queries * keys * 4 for queries, keys in sequences)
    return 2 * tokens * weights + 2 * attention + 2 * scored * 8 * 32


@pytest.mark.parametrize(("kind", "scored"), [("log-probabilities", 1), ("rewards", 0), ("ppo update", 1)])
def test_the_allowed_ratio_matches_naive_counts(kind, scored):
    comparison = make_comparison(10, [3, 5, 2], 32)
    apart = naive_flops([(13, 13), (15, 15), (12, 12)], scored * 10)
    shared = naive_flops([(13, 13), (5, 15), (2, 12)], scored * 10)
    assert allowed_ratio(kind, comparison, SHAPE) == pytest.approx(apart / shared, rel=1e-12)


def test_eight_answers_to_a_long_prompt_have_known_ratios():
    """With half of the FLOPs in the head, sharing 512 tokens saves less the longer the answers are."""
    shape = Shape(hidden=384, layers=8, heads=6, kv_heads=3, head_size=64, intermediate=1024, vocabulary=49152)
    ratios = [allowed_ratio("log-probabilities", make_comparison(512, [n] * 8, 49152), shape) for n in (32, 64, 128)]
    assert ratios == pytest.approx([4.37, 3.23, 2.34], abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_runs(kind):
    setting = Setting("", threads=1, model="toy")
    comparison = make_comparison(20, [3, 4], setting.vocabulary)
    assert [one.response_ids for one in split_by_answer(comparison)] == [[ids] for ids in comparison.response_ids]
    found = measure(kind, make_scorer(kind, setting), comparison, setting, rounds=1)
    assert found.shared > 0 and found.one_by_one > 0 and found.allowed > 1
