"""Answer statistics worked out by hand, and which changes in them are signs of collapse."""

import math
import random

import pytest

from simpo.evaluation.during_training import AnswerStatistics, signs_of_collapse
from simpo.generation.engine import Sampled

GOOD = AnswerStatistics(length=20.0, end_of_turn_rate=0.9, distinct_2=0.95)


def test_statistics_match_values_by_hand():
    answers = [
        Sampled([7, 8, 7, 8, 7], finished=False, logp=None),  # bigrams 78 87 78 87: two of four are distinct
        Sampled([4, 5, 2], finished=True, logp=None),  # bigrams 45 52: two of two
        Sampled([2], finished=True, logp=None),  # no bigrams
    ]
    assert AnswerStatistics.of(answers) == AnswerStatistics(3.0, 2 / 3, 0.75)
    assert math.isnan(AnswerStatistics.of(answers[2:]).distinct_2)


def test_distinct_2_matches_its_definition():
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(5) for _ in range(rng.randrange(2, 30))]
        different: list[tuple[int, int]] = []
        for place in range(1, len(ids)):
            if (ids[place - 1], ids[place]) not in different:
                different.append((ids[place - 1], ids[place]))
        found = AnswerStatistics.of([Sampled(ids, finished=True, logp=None)])
        assert found.distinct_2 == pytest.approx(len(different) / (len(ids) - 1))


@pytest.mark.parametrize(
    ("now", "start", "expected_length", "signs"),
    [
        pytest.param(GOOD, GOOD, 20, [], id="as before"),
        pytest.param(AnswerStatistics(39, 0.5, 0.5), GOOD, 5, [], id="within all bounds"),
        pytest.param(AnswerStatistics(41, 0.9, 0.95), GOOD, 5, ["length 20 -> 41"], id="more than twice as long"),
        pytest.param(AnswerStatistics(41, 0.9, 0.95), GOOD, 25, [], id="no longer than twice the held-out responses"),
        pytest.param(
            AnswerStatistics(20, 0.4, 0.95), GOOD, 20, ["end_of_turn_rate 0.9 -> 0.4"], id="half are unfinished"
        ),
        pytest.param(
            AnswerStatistics(20, 0.0, 1), AnswerStatistics(20, 0.25, 1), 20, [], id="one more of four unfinished"
        ),
        pytest.param(AnswerStatistics(20, 0.9, 0.47), GOOD, 20, ["distinct_2 0.95 -> 0.47"], id="half are repeated"),
        pytest.param(AnswerStatistics(1, 1, math.nan), GOOD, 20, [], id="no two tokens"),
        pytest.param(GOOD, AnswerStatistics(64, 0.0, 0.1), 20, [], id="an initial model that cannot answer"),
        pytest.param(
            AnswerStatistics(64, 0.0, 0.05),
            GOOD,
            20,
            ["end_of_turn_rate 0.9 -> 0", "length 20 -> 64", "distinct_2 0.95 -> 0.05"],
            id="all signs together",
        ),
    ],
)
def test_signs_of_collapse_are_detected(now, start, expected_length, signs):
    assert signs_of_collapse(now, start, expected_length) == signs
