"""Statistics of several answers to one prompt, against values worked out by hand."""

from __future__ import annotations

import pytest

from simpo.data.inspection import (
    AnswerSet,
    distinct_ngrams,
    diversity_metrics,
    longer_wins,
    mean_overlap,
    score_metrics,
)


def test_distinct_ngrams_match_values_by_hand():
    assert distinct_ngrams(["a b c", "a b d"]) == 3 / 4  # ab bc | ab bd
    assert distinct_ngrams(["a b", "a b", "a b"]) == 1 / 3
    assert distinct_ngrams(["one", ""]) is None


def test_overlap_matches_values_by_hand():
    assert mean_overlap(["a b c", "a b d"]) == 1 / 3
    assert mean_overlap(["a b c", "a b d", "x y"]) == pytest.approx(1 / 9)
    assert mean_overlap(["one", "one"]) == 1
    assert mean_overlap(["one", "two"]) == 0
    assert mean_overlap(["a b"]) is None


def test_longer_wins_match_values_by_hand():
    assert longer_wins(AnswerSet(["aaa", "b", "cc"], [1.0, 2.0, 2.0])) == 0  # a-b and a-c; b and c are tied
    assert longer_wins(AnswerSet(["aaa", "b", "cc"], [3.0, 1.0, 2.0])) == 1
    assert longer_wins(AnswerSet(["aaa", "b", "cc"], [3.0, None, 4.0])) == 0
    assert longer_wins(AnswerSet(["a", "b"], [3.0, 1.0])) is None
    assert longer_wins(AnswerSet(["a", "bb"])) is None


def test_metrics_average_over_prompts():
    sets = [AnswerSet(["a b", "a b", "c d e"], [1.0, 1.0, 4.0]), AnswerSet(["x", "yy", ""], [None, 2.0, 2.0])]
    found = {metric.name: metric for metric in diversity_metrics("s", sets) + score_metrics("s", sets)}
    assert (found["s/prompts"].value, found["s/answers"].value) == (2, 6)
    assert found["s/distinct_answers"].value == pytest.approx((2 / 3 + 1) / 2)
    assert found["s/distinct_2"].value == pytest.approx(3 / 4) and found["s/distinct_2"].n == 1
    assert found["s/unscored"].value == 1
    assert found["s/score"].value == 2 and found["s/score"].n == 2
    assert (found["s/best_score"].value, found["s/worst_score"].value) == (3, 1.5)
    assert found["s/longer_wins"].value == 1 and found["s/longer_wins"].n == 1
    assert found["s/all_equal"].value == 1
    assert found["s/score/p50"].value == 2 and found["s/score/p50"].n == 5


def test_answers_without_scores_have_no_score_metrics():
    [metric] = score_metrics("s", [AnswerSet(["a", "b"], [None, None])])
    assert (metric.name, metric.value) == ("s/unscored", 2)
