"""A resumed run loads its own best checkpoint at the end, or names what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.training.test_resume import AfterStep, flip_one_byte, options, same_weights, truncate
from tests.training_runs import killed_after_step

from simpo import cli
from simpo.training import run as workflow
from simpo.training.checkpoints import checkpoints

pytestmark = pytest.mark.slow

# The margins grow, so the best checkpoint is the first, checkpoint-2.
BEST = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rewards/margins", "max_steps": 8}
BEST |= {"load_best_model_at_end": "true", "greater_is_better": "false", "save_total_limit": 1}


@pytest.fixture(scope="module")
def killed_once(chat_world, tmp_path_factory):
    """A run that was killed after its seventh step."""
    output = tmp_path_factory.mktemp("killed") / "run"
    with killed_after_step(7):
        cli.main(options(chat_world, output, **BEST))
    assert [path.name for path in checkpoints(output)] == ["checkpoint-6", "checkpoint-2"]
    return output


@pytest.fixture
def killed(killed_once, tmp_path):
    """A copy of the killed run."""
    return shutil.copytree(killed_once, tmp_path / "run")


def remove(path: Path) -> None:
    path.unlink()


def remove_checkpoint(path: Path) -> None:
    shutil.rmtree(path.parent)


DAMAGES = [flip_one_byte, truncate, remove, remove_checkpoint]


def assert_one_line_about(best: Path, output: Path, capsys) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(best) in error and "load_best_model_at_end" in error
    assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_does_not_resume_without_its_best_checkpoint(damage, chat_world, killed, capsys):
    """Also in a copied folder, whose checkpoints record the original one, where the best checkpoint is intact."""
    steps = (killed / "metrics.jsonl").read_text()
    damage(killed / "checkpoint-2/model.safetensors")
    assert cli.main(options(chat_world, killed, **BEST)) == 2
    assert_one_line_about(killed / "checkpoint-2", killed, capsys)
    assert (killed / "checkpoint-6").is_dir() and (killed / "metrics.jsonl").read_text() == steps


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_best_checkpoint_damaged_during_the_run_is_not_loaded(damage, chat_world, killed, monkeypatch, capsys):
    train = workflow.PackedTrainer.train

    def damaging(self, *args, **kwargs):
        self.add_callback(AfterStep(7, lambda: damage(killed / "checkpoint-2/model.safetensors")))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(workflow.PackedTrainer, "train", damaging)
    assert cli.main(options(chat_world, killed, **BEST)) == 2
    assert_one_line_about(killed / "checkpoint-2", killed, capsys)


def test_a_run_started_from_a_checkpoint_of_another_run_loads_that_runs_best(chat_world, killed, tmp_path, capsys):
    """Also after it was killed itself."""
    changes = BEST | {"resume_from_checkpoint": killed / "checkpoint-6", "max_steps": 12}
    with killed_after_step(9):
        cli.main(options(chat_world, tmp_path / "new", **changes))
    assert [path.name for path in checkpoints(tmp_path / "new")] == ["checkpoint-8"]
    assert cli.main(options(chat_world, tmp_path / "new", **changes)) == 0
    assert same_weights(tmp_path / "new", killed / "checkpoint-2")
    state = json.loads((tmp_path / "new/trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == killed / "checkpoint-2"
    flip_one_byte(killed / "checkpoint-2/model.safetensors")
    assert cli.main(options(chat_world, tmp_path / "newer", **changes)) == 2
    assert_one_line_about(killed / "checkpoint-2", tmp_path / "newer", capsys)
