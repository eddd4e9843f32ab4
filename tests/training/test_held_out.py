"""Held-out metrics before and after training, for pairs, rankings and single responses."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from simpo.training.metrics import compare_preferences, read_scores, write_scores

NAN = float("nan")


def metrics(before, after, **how) -> dict:
    before, after = ({name: np.array(v) for name, v in scores.items()} for scores in (before, after))
    found = compare_preferences(before, after, **how)
    return {(metric.name, metric.stage): metric for metric in found}


def test_pairs_are_right_or_wrong():
    weight = {"weight": [1.0] * 4, "loss": [1.0] * 4}
    found = metrics({"rewards/accuracies": [0, 0, 1, 0]} | weight, {"rewards/accuracies": [1, 1, 1, 0]} | weight)
    accuracy = found["eval_rewards/accuracies", "after"]
    assert (accuracy.value, accuracy.n, accuracy.method) == (0.75, 4, "Wilson 95%")
    assert found["eval_rewards/accuracies/p_value", None].value == pytest.approx(0.25)  # both changed rows improved
    assert ("eval_weight", "after") not in found


def test_rankings_can_be_partly_right():
    found = metrics({"rewards/accuracies": [0, 1, 0]}, {"rewards/accuracies": [1 / 3, 1, 0.5]})
    accuracy = found["eval_rewards/accuracies", "after"]
    assert (accuracy.value, accuracy.method) == (pytest.approx(11 / 18), "Wilson, Student t 95%")
    assert 0 <= accuracy.low < accuracy.high <= 1  # 11/18 plus half of the symmetric interval would exceed 1
    assert ("eval_rewards/accuracies/p_value", None) not in found


def test_single_responses_have_their_own_metrics():
    before = {"loss": [1.0, 2.0, 3.0, 4.0], "rewards/chosen": [0, NAN, 0, NAN], "rewards/rejected": [NAN, 0, NAN, 0]}
    after = before | {"rewards/chosen": [2.0, NAN, 1.0, NAN], "rewards/rejected": [NAN, 1.0, NAN, 1.5]}
    found = metrics(before, after)
    assert (found["eval_loss", "after"].value, found["eval_loss", "after"].n) == (2.5, 4)
    assert (found["eval_rewards/chosen", "after"].value, found["eval_rewards/chosen", "after"].n) == (1.5, 2)
    assert found["eval_rewards/rejected", "after"].value == 1.25
    assert found["eval_rewards/auc", "before"].value == 0.5
    assert found["eval_rewards/auc", "after"].value == (1 + 1 + 0.5 + 0) / 4


def test_a_broken_model_is_visible():
    """Non-finite values after training are not dropped."""
    before = {"loss": [1.0, 2.0], "rewards/chosen": [0, NAN], "rewards/rejected": [NAN, 0]}
    found = metrics(before, before | {"rewards/chosen": [NAN, NAN]})
    assert np.isnan(found["eval_rewards/chosen", "after"].value)


def test_with_a_reference_the_start_model_has_no_preferences():
    """Its rewards are 0 up to rounding, so the sign of their difference is meaningless."""
    rounding = {"rewards/accuracies": [0, 1, 0, 1], "rewards/margins": [-1e-7, 1e-7, 0, 1e-7]}
    trained = {"rewards/accuracies": [1, 1, 1, 0], "rewards/margins": [1.0, 1.0, 1.0, -1.0]}
    found = metrics(rounding, trained, has_reference=True)
    assert set(found) == {
        ("eval_rewards/accuracies", "after"),
        ("eval_rewards/margins", "before"),
        ("eval_rewards/margins", "after"),
    }
    assert found["eval_rewards/accuracies", "after"].low < 0.5 < found["eval_rewards/accuracies", "after"].high
    alone = {"rewards/chosen": [1e-7, NAN], "rewards/rejected": [NAN, 0]}
    assert ("eval_rewards/auc", "before") not in metrics(alone, alone, has_reference=True)
    assert ("eval_rewards/auc", "after") in metrics(alone, alone, has_reference=True)


def test_stored_scores_that_were_modified_are_not_trusted(tmp_path, caplog):
    path, rows = (
        tmp_path / "scores.jsonl",
        Dataset.from_dict({"where": ["a", "b"], "response_ids": [[[1], [2, 3]]] * 2}),
    )
    scores = {"loss": np.array([0.5, 0.25]), "weight": np.array([1.0, 1.0])}
    write_scores(path, rows, scores)
    assert read_scores(path, 2)["loss"].tolist() == [0.5, 0.25]
    for damaged in (path.read_text().replace("0.25", "0.26"), '{"a": 1}\n{"b": 2}\n', ""):
        path.write_text(damaged)
        assert read_scores(path, 2) is None and "scores.jsonl is damaged" in caplog.text
        write_scores(path, rows, scores)
        assert read_scores(path, 2)["loss"].tolist() == [0.5, 0.25]
