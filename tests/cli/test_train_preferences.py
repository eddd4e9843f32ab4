"""``simpo train`` on rankings, on labeled single responses and with a reference; and rejected input, in one line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from simpo.cli import main
from simpo.runs.files import read_lines
from simpo.runs.results import read_results


def options(world, output, **changes):
    given = {
        "model_name_or_path": world / "model",
        "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl",
        "output_dir": output,
        "reference_cache": output.parent / "reference",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "save_strategy": "no",
    } | changes
    return ["train", *(f"--{key}={value}" for key, value in given.items() if value is not None)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rankings(chat_world, tmp_path):
    """The pairs with a third answer, tied with the rejected one."""
    rows = [json.loads(line) for line in (chat_world / "train.jsonl").open()]
    found = [
        {"prompt": r["prompt"], "responses": [r["rejected"], r["chosen"], "I do not know."], "scores": [0, 1, 0]}
        for r in rows
    ]
    return write(tmp_path / "rankings.jsonl", found)


@pytest.fixture
def judged(chat_world, tmp_path):
    """The pairs as single responses."""
    rows = [json.loads(line) for line in (chat_world / "train.jsonl").open()]
    found = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    return write(tmp_path / "judged.jsonl", found)


def read_metrics(output) -> dict:
    return {(metric.name, metric.stage): metric for metric in read_results(output / "results.json").metrics}


def but_the_last(path, **changes):
    """Write the same rows with the last one changed, because training rows are not accepted as held-out rows."""
    *rows, last = (json.loads(line) for line in path.open())
    return write(path.with_suffix(".held_out.jsonl"), [*rows, last | changes])


def test_rankings_can_be_trained_on(chat_world, rankings, tmp_path):
    out = tmp_path / "out"
    held_out = but_the_last(rankings, prompt="Is it?")
    assert main(options(chat_world, out, dataset_name=rankings, eval_dataset_name=held_out, objective="dpo")) == 0
    found = read_metrics(out)
    assert found["eval_loss", "before"].value == pytest.approx(math.log(2), abs=1e-5)
    assert found["eval_rewards/margins", "after"].low > 0
    assert found["eval_rewards/accuracies", "after"].n == 24
    assert ("eval_rewards/accuracies", "before") not in found  # all rewards are 0 up to rounding


def test_single_responses_can_be_trained_on(chat_world, judged, tmp_path, capsys):
    out = tmp_path / "out"
    held_out = but_the_last(judged, prompt="Is it?")
    given = {"dataset_name": judged, "eval_dataset_name": held_out, "objective": "kto", "beta": 0.5, "logging_steps": 1}
    assert main(options(chat_world, out, **given)) == 0
    found = read_metrics(out)
    assert found["eval_loss", "before"].value == pytest.approx(0.5, abs=1e-5)  # both terms at reward and point 0
    scores = read_lines(out / "held_out_after.jsonl")
    chosen, rejected = (
        [s[name] for s in scores if s[name] is not None] for name in ("rewards/chosen", "rewards/rejected")
    )
    assert (len(chosen), len(rejected)) == (24, 24)
    assert found["eval_rewards/chosen", "after"].value == pytest.approx(np.mean(chosen))
    assert found["eval_rewards/rejected", "after"].n == 24
    ordered = np.mean([(a > b) + (a == b) / 2 for a in chosen for b in rejected])
    assert found["eval_rewards/auc", "after"].value == pytest.approx(ordered)
    assert ("eval_rewards/auc", "before") not in found  # all rewards are 0
    logged = read_lines(out / "metrics.jsonl")[0]
    assert {"loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= logged.keys()
    assert "nan" not in capsys.readouterr().out.lower()


def test_another_objective_finds_the_cached_reference(chat_world, tmp_path):
    """The cache does not need to be named."""
    for objective in ("dpo", "kto"):
        assert main(options(chat_world, tmp_path / objective, objective=objective, kl_weight=0.1)) == 0
        assert read_metrics(tmp_path / objective)["eval_kl", "before"].value == pytest.approx(0, abs=1e-6)
        assert read_metrics(tmp_path / objective)["eval_kl", "after"].value > 1e-6
    assert len([path for path in (tmp_path / "reference").iterdir() if path.is_dir()]) == 4  # KTO needs extra ones


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": "dpo", "gamma_beta_ratio": 0.5},
            "gamma_beta_ratio is not a hyperparameter of objective 'dpo' (it",
        ),
        ({"objective": "dpo", "label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5)"),
        ({"loss_type": "sigmoid", "beta": 0.01}, "loss_type: 'sigmoid' "),
        ({"dataset_name": "judged"}, "train: objective 'simpo' needs pairs"),
        ({"dataset_name": "alike", "objective": "kto"}, "train: every row has the label true"),
        (
            {"dataset_name": "numbers", "objective": "kto"},
            "rows are bad, more than 1%; fix them (numbers.jsonl:1: label",
        ),
        ({"dataset_name": "equal"}, "rows are bad, more than 1%; fix them (equal.jsonl:1: all scores are equal"),
        ({"dataset_name": "missing"}, "responses without scores to rank them by"),
        ({"dataset_name": "same", "objective": "kto"}, "train: all prompts are the same"),
        ({"dataset_name": "tagged", "objective": "kto"}, "for objectives kto and bco also {prompt, completion, label}"),
    ],
)
def test_mistakes_give_a_one_line_error(changes, message, chat_world, judged, tmp_path, capsys):
    rows = [json.loads(line) for line in judged.open()]
    made = {
        "alike": [row for row in rows if row["label"]],
        "numbers": [row | {"label": 2 + row["label"]} for row in rows],
        "equal": [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}] * 3,
        "missing": [{"prompt": "p", "responses": ["a", "b"]}] * 3,
        "same": [{"prompt": "p", "chosen": "yes", "rejected": "no"}] * 3,
        "tagged": [{"instruction": "p", "output": "a", "liked": True}] * 3,
    }
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in made.items()} | {"judged": judged}
    name = changes.get("dataset_name")
    if name is not None:
        changes = changes | {"dataset_name": files[name]}
    assert main(options(chat_world, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("simpo: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_cache_for_different_weights_is_rejected(chat_world, tmp_path, capsys):
    assert main(options(chat_world, tmp_path / "one", objective="dpo")) == 0
    trained = options(chat_world, tmp_path / "two", objective="ipo", model_name_or_path=tmp_path / "one")
    assert main(trained) == 2
    assert "reference_cache: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "two").exists()
