"""Several annotators combined: scores against numpy and scipy, missing scores, and mistakes."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
from scipy.stats import rankdata, zscore

from simpo import SimpoError
from simpo.judging.protocol import Answers, Scorer
from simpo.judging.registry import CombinedScorer, count_unscored, make_annotator, normalize
from simpo.judging.settings import JudgeOptions

GENERATOR = np.random.default_rng(0)


class Table(Scorer):
    """Looks up scores by the answers' texts."""

    identity: ClassVar = {"judge": "table"}

    def __init__(self, scores):
        self.scores = scores

    def score(self, rows):
        return [[self.scores[text] for text in row.responses] for row in rows]


@pytest.mark.parametrize(
    "scores", [GENERATOR.normal(3, 20, 7).tolist(), [1.0, 5.0, 1.0, 4.0, 4.0], [0.1, 0.1, 0.1], [2.0]]
)
def test_normalization_matches_numpy_and_scipy(scores):
    differ, n = len(set(scores)) > 1, len(scores)
    assert normalize(scores, "none") == scores
    expected = zscore(scores, ddof=1) if differ else np.zeros(n)
    assert normalize(scores, "zscore") == pytest.approx(expected, abs=1e-12)
    expected = (rankdata(scores) - 1) / (n - 1) if differ else np.full(n, 0.5)
    assert normalize(scores, "rank") == pytest.approx(expected, abs=1e-12)


def test_scores_that_hardly_differ_count_as_equal():
    assert normalize([0.0] * 8 + [5e-324], "zscore") == [0.0] * 9  # their standard deviation rounds to 0


@pytest.mark.parametrize("normalization", ["none", "zscore", "rank"])
def test_scores_are_weighted_sums_of_per_prompt_normalized_scores(normalization):
    """For prompts of different sizes, alone and together, and annotators in any order."""
    texts = [f"t{k}" for k in range(9)]
    tables = {
        name: Table(dict(zip(texts, GENERATOR.normal(0, size, 9), strict=True)))
        for name, size in (("a", 1), ("b", 30), ("c", 2))
    }
    weights = {"a": 0.5, "b": 2.0, "c": 0.1}
    rows = [Answers("p", "?", texts[:4]), Answers("q", "?", texts[4:]), Answers("r", "?", texts[:1])]
    scorer = CombinedScorer(tables, weights, normalization)
    found = scorer.score(rows)
    for row, combined in zip(rows, found, strict=True):
        naive = np.zeros(len(row.responses))
        for name, table in tables.items():
            own = np.array([table.scores[text] for text in row.responses])
            if normalization == "zscore":
                own = (own - own.mean()) / own.std(ddof=1) if len(own) > 1 else np.zeros(1)
            elif normalization == "rank":
                own = (rankdata(own) - 1) / (len(own) - 1) if len(own) > 1 else np.full(1, 0.5)
            naive += weights[name] * own
        assert combined == pytest.approx(naive, abs=1e-12)
        assert scorer.score([row]) == [combined]
    turned = CombinedScorer(dict(reversed(tables.items())), weights, normalization)
    assert turned.score(rows) == found


def test_an_answer_unscored_by_one_annotator_has_no_score():
    """The other scores are those of the prompt without that answer."""
    tables = {
        "a": Table({"x": 1.0, "y": None, "z": 4.0, "u": 9.0}),
        "b": Table({"x": 2.0, "y": 7.0, "z": math.nan, "u": 1.0}),
    }
    scorer = CombinedScorer(tables, {"a": 1.0, "b": 3.0}, "zscore")
    (found, lost), (without,) = (
        scorer.score([Answers("p", "?", ["x", "y", "z", "u"]), Answers("q", "?", ["y", "z"])]),
        scorer.score([Answers("p", "?", ["x", "u"])]),
    )
    assert found == [without[0], None, None, without[1]] and None not in without and lost == [None, None]
    assert count_unscored(
        {name: table.score([Answers("p", "?", ["x", "y", "z"])]) for name, table in tables.items()}
    ) == {"a": 1, "b": 1}


def test_the_identity_covers_everything_that_affects_the_scores():
    options = JudgeOptions()
    found = [
        make_annotator({"exact": weight}, options, how).identity
        for weight, how in ((1.0, None), (1.0, "zscore"), (2.0, "zscore"), (1.0, "rank"))
    ]
    assert found[0] == found[1] and all(found[0] != other for other in found[2:])
    assert found[0]["exact/judge"] == "exact"


@pytest.mark.parametrize(
    ("annotator", "normalization", "message"),
    [
        ({}, None, "annotator"),
        ({"exact": 0.0}, None, "exact"),
        ({"exact": -1.0}, None, "exact"),
        ({"exact": math.nan}, None, "exact"),
        ({"exact": math.inf}, None, "exact"),
        ({"exact": 1.0, "exakt": 1.0}, None, "exakt"),
        ("exact", "rank", "annotator_normalization"),
        ({"exact": 1.0, "api": 1.0}, None, "judge_url"),
    ],
)
def test_mistakes_are_reported_by_name(annotator, normalization, message):
    with pytest.raises(SimpoError, match=message):
        make_annotator(annotator, JudgeOptions(), normalization)
