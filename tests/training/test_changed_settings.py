"""A resumed run follows the settings of its own command, not those in its checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.training.test_best_checkpoint import BEST
from tests.training.test_resume import metrics, options
from tests.training_runs import killed_after_step

from simpo import cli
from simpo.training.checkpoints import checkpoints

pytestmark = pytest.mark.slow

STEPS = {"max_steps": 8, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def killed_once(chat_world, tmp_path_factory):
    """A run that was killed after its fifth step, and has checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("killed") / "run"
    with killed_after_step(5):
        cli.main(options(chat_world, output, **STEPS))
    return output


@pytest.fixture
def killed(killed_once, tmp_path):
    """A copy of the killed run."""
    return shutil.copytree(killed_once, tmp_path / "run")


def steps_with(key, folder):
    return [line["step"] for line in metrics(folder) if key in line]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_new_intervals_take_effect(elsewhere, chat_world, killed, tmp_path):
    """In the same folder, and in a new one that starts from a checkpoint."""
    changes = STEPS | {"logging_steps": 3, "save_steps": 3}
    output = killed
    if elsewhere:
        output = tmp_path / "new"
        changes |= {"eval_steps": 4, "resume_from_checkpoint": killed / "checkpoint-4"}
    assert cli.main(options(chat_world, output, **changes)) == 0
    saved = [int(path.name.rpartition("-")[2]) for path in reversed(checkpoints(output))]
    assert saved == ([6, 8] if elsewhere else [2, 4, 6, 8])
    assert [step for step in steps_with("loss", output) if step > 4] == [6]
    assert [step for step in steps_with("eval_loss", output) if step > 4] == ([8] if elsewhere else [6, 8])


@pytest.mark.parametrize("change", [{"save_steps": 4}, {"save_strategy": "best"}])
def test_when_a_best_model_is_loaded_what_is_saved_belongs_to_the_identity(change, chat_world, tmp_path, capsys):
    """And only then; a model that is not saved cannot be the best."""
    output = tmp_path / "run"
    with killed_after_step(5):
        cli.main(options(chat_world, output, **BEST))
    capsys.readouterr()
    assert cli.main(options(chat_world, output, **BEST | change)) == 2
    assert f"{next(iter(change))}: was" in capsys.readouterr().err
    assert cli.main(options(chat_world, output, **BEST | change, accept_changes="true")) == 0
    assert json.loads((output / "run.json").read_text())["changes"][0]["now"].keys() >= change.keys()
