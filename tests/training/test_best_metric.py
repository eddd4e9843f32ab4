"""``metric_for_best_model`` names a metric of the evaluations, or the run ends before it begins."""

from __future__ import annotations

import pytest

from simpo import cli
from simpo.errors import SimpoError
from simpo.training.callbacks import check_measured


def options(world, output, **changes):
    given = {
        "model_name_or_path": world / "model", "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl", "output_dir": output, "per_device_train_batch_size": 4,
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no",
    } | changes  # fmt: skip
    return ["train", *(f"--{key}={value}" for key, value in given.items())]


@pytest.mark.parametrize(
    ("name", "changes", "suggested"),
    [
        ("eval_nonsense", {}, None),
        ("rewards/margin", {}, "eval_rewards/margins"),
        ("eval_rewards/accuracy", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "eval_rewards/accuracies"),
        ("kl", {}, None),
        ("eval_generations/win_rate", {"eval_generations": 2, "max_length": 40}, None),
    ],
)
def test_a_metric_that_is_not_measured_is_rejected_before_anything_is_written(
    name, changes, suggested, chat_world, tmp_path, capsys
):
    assert cli.main(options(chat_world, tmp_path / "run", metric_for_best_model=name, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "metric_for_best_model" in error and name in error and "eval_rewards/margins" in error
    assert suggested is None or error.endswith(f"did you mean {suggested}?")
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {"log.txt", ".lock", ".lock.pid"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("loss", {"lr_scheduler_type": "reduce_lr_on_plateau"}),
        ("eval_kl", {"kl_weight": 0.1}),
        ("generations/distinct_2", {"eval_generations": 2, "max_length": 40}),
        ("eval_runtime", {}),
    ],
)
def test_a_metric_that_is_measured_is_accepted(name, changes, chat_world, tmp_path):
    assert cli.main(options(chat_world, tmp_path / "run", metric_for_best_model=name, **changes)) == 0


@pytest.mark.parametrize(
    "settings", [{}, {"kl_weight": 0.1, "wpo_weights": True}, {"objective": "kto", "beta": 0.1}], ids=str
)
def test_exactly_the_metrics_of_an_evaluation_are_known(settings, make_trainer, pairs):
    rows = pairs(6)
    if "objective" in settings:
        rows = pairs(6, responses=1).add_column("label", [True, False, False, True, True, True])
    trainer = make_trainer(rows, eval_dataset=rows, **settings)
    found = trainer.evaluate().keys() - {"epoch"}
    assert {f"eval_{name}" for name in trainer.evaluated_names} == {
        name for name in found if not name.endswith(("runtime", "per_second"))
    }
    for name in found:
        check_measured("metric_for_best_model", name, trainer)
        check_measured("metric_for_best_model", name.removeprefix("eval_"), trainer)
    for name in ("nonsense", "eval_eval_loss", "rollout/reward"):
        with pytest.raises(SimpoError, match="metric_for_best_model"):
            check_measured("metric_for_best_model", name, trainer)
