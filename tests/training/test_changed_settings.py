"""A resumed run follows the settings of its own command, not those in its checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.training.test_best_checkpoint import BEST
from tests.training.test_resume import metrics, options, same_weights
from tests.training_runs import killed_after_step

from simpo import cli
from simpo.training import sharding
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


def rates(folder):
    return {line["step"]: line["learning_rate"] for line in metrics(folder) if "learning_rate" in line}


CONTINUATIONS = [False, True]  # in the same folder with accept_changes, and in a new one from a checkpoint


def continued(elsewhere, killed, tmp_path):
    """Return the folder and the settings of a run that continues from the killed run's checkpoint-4."""
    if elsewhere:
        return tmp_path / "new", STEPS | {"resume_from_checkpoint": killed / "checkpoint-4"}
    return killed, STEPS | {"accept_changes": "true"}


@pytest.mark.parametrize("elsewhere", CONTINUATIONS)
def test_a_new_learning_rate_takes_effect(elsewhere, chat_world, killed, tmp_path):
    """The schedule goes on from its step, scaled by the new learning rate."""
    assert cli.main(options(chat_world, tmp_path / "uninterrupted", **STEPS)) == 0
    output, changes = continued(elsewhere, killed, tmp_path)
    assert cli.main(options(chat_world, output, **changes, learning_rate=5e-3)) == 0
    expected, found = rates(tmp_path / "uninterrupted"), rates(output)
    for step in (5, 6, 7, 8):  # of the step just taken
        assert found[step] == pytest.approx(5 * expected[step], rel=1e-12)


@pytest.mark.parametrize("changed", [{"weight_decay": 0.3}, {"adam_beta1": 0.5}, {"adam_epsilon": 1}])
def test_new_settings_of_the_optimizer_take_effect(changed, chat_world, killed, tmp_path):
    """The final checkpoint has the new values; biases and norms still have no weight decay."""
    output, changes = continued(elsewhere=False, killed=killed, tmp_path=tmp_path)
    old = torch.load(killed / "checkpoint-4/optimizer.pt", weights_only=True)["param_groups"]
    assert cli.main(options(chat_world, output, **changes, **changed)) == 0
    new = torch.load(output / "checkpoint-8/optimizer.pt", weights_only=True)["param_groups"]
    betas = tuple(changed.get(key, old[0]["betas"][index]) for index, key in enumerate(("adam_beta1", "adam_beta2")))
    expected = {"betas": betas, "eps": changed.get("adam_epsilon", old[0]["eps"])}
    for group, decay in zip(new, (changed.get("weight_decay", 0.0), 0.0), strict=True):
        assert {key: group[key] for key in ("weight_decay", *expected)} == {"weight_decay": decay, **expected}
    before, after = (load_file(folder / "model.safetensors") for folder in (output / "checkpoint-4", output))
    plain = tmp_path / "plain"
    assert cli.main(options(chat_world, plain, **STEPS, resume_from_checkpoint=output / "checkpoint-4")) == 0
    assert before.keys() == after.keys() and not same_weights(output, plain)


def test_other_optimizers_keep_the_state_in_their_groups():
    """The count in a group that is not an argument of the constructor is restored, its settings are not."""

    class Counting(torch.optim.SGD):
        def __init__(self, params, lr=0.1, momentum=0.9):
            super().__init__(params, lr=lr, momentum=momentum)
            for group in self.param_groups:
                group["k"] = 0

    def build(**settings):
        optimizer = Counting([torch.nn.Parameter(torch.ones(2))], **settings)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    saved, schedule = build()
    saved.param_groups[0]["k"] = 7
    schedule.step()
    loaded, other = build(lr=0.4, momentum=0.5)
    sharding._load_state(loaded, saved.state_dict())
    sharding._load_schedule(other, schedule.state_dict())
    found = loaded.param_groups[0]
    assert (found["k"], found["momentum"], found["lr"], found["initial_lr"]) == (7, 0.5, 0.2, 0.4)
    loaded.step()
    other.step()
    assert found["lr"] == pytest.approx(0.4 / 3)


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
@pytest.mark.parametrize("elsewhere", CONTINUATIONS)
def test_another_optimizer_is_rejected(optim, elsewhere, chat_world, killed, tmp_path, capsys):
    output, changes = continued(elsewhere, killed, tmp_path)
    assert cli.main(options(chat_world, output, **changes, optim=optim)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "optim: " in error and str(killed / "checkpoint-4") in error


@pytest.mark.parametrize("changed", [{"max_steps": 3}, {"use_peft": "true"}, {"optim": "sgd"}])
def test_a_start_that_fails_leaves_the_run_as_it_was(changed, chat_world, killed, tmp_path, capsys):
    """The original command still continues it; a new folder is not created."""
    before = (killed / "run.json").read_bytes()
    assert cli.main(options(chat_world, killed, **STEPS | changed, accept_changes="true")) == 2
    assert (killed / "run.json").read_bytes() == before
    output, changes = continued(elsewhere=True, killed=killed, tmp_path=tmp_path)
    assert cli.main(options(chat_world, output, **changes | changed)) == 2
    assert not output.exists()
    assert all(str(killed / "checkpoint-4") in line for line in capsys.readouterr().err.strip().splitlines())
    assert cli.main(options(chat_world, killed, **STEPS)) == 0


def test_a_run_folder_in_place_of_a_checkpoint_is_rejected_with_its_newest_checkpoint(
    chat_world, killed, tmp_path, capsys
):
    argv = options(chat_world, tmp_path / "new", **STEPS, resume_from_checkpoint=killed)
    for finished in (False, True):
        if finished:
            assert cli.main(options(chat_world, killed, **STEPS)) == 0
        capsys.readouterr()
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(killed / f"checkpoint-{8 if finished else 4}") in error
