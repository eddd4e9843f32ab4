"""Stopped, damaged and repeated runs end with the same weights and metrics as an uninterrupted run."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training_runs import Killed
from transformers import TrainerCallback

from simpo import cli
from simpo.errors import InterruptedRun, SimpoError
from simpo.runs.folder import RunFolder
from simpo.runs.manifest import write_manifest
from simpo.runs.results import read_results
from simpo.training import checkpoints as resumable
from simpo.training import run as workflow
from simpo.training.checkpoints import ResumableTrainer, StopOnSignal, checkpoints, last_good_checkpoint

pytestmark = pytest.mark.slow

LIMIT = {"save_total_limit": 2}
_TIMES = ("runtime", "per_second", "preparation_time")


class AfterStep(TrainerCallback):
    """Calls ``action`` after ``step`` optimizer steps."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def die():
    raise Killed


def run_after_step(patches: pytest.MonkeyPatch, step, action):
    """Make the next run call ``action`` after that step."""
    train = workflow.PackedTrainer.train

    def watched(self, *args, **kwargs):
        self.add_callback(AfterStep(step, action))
        return train(self, *args, **kwargs)

    patches.setattr(workflow.PackedTrainer, "train", watched)
    return patches


@pytest.fixture
def after_step(monkeypatch):
    """``after_step(step, action)``: the next run calls ``action`` after that step."""
    return functools.partial(run_after_step, monkeypatch)


def options(world, output, **changes):
    given = {
        "model_name_or_path": world / "model",
        "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl",
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "epoch",
        "disable_dropout": "false",
    } | changes
    return ["train", *(f"--{key}={value}" for key, value in given.items() if value is not None)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(_TIMES) and k != "total_flos"} for line in lines]


def final_metrics(folder: Path) -> list[tuple]:
    return [(m.name, m.stage, m.value) for m in read_results(folder / "results.json").metrics]


@pytest.fixture(scope="module")
def uninterrupted(chat_world, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert cli.main(options(chat_world, output)) == 0
    return output


@pytest.fixture(scope="module")
def killed_once(chat_world, tmp_path_factory):
    """A run that was killed after its seventh step."""
    output = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patches, pytest.raises(Killed):
        run_after_step(patches, 7, die)
        cli.main(options(chat_world, output, **LIMIT))
    return output


@pytest.fixture
def killed(killed_once, tmp_path):
    """A copy of the killed run, to be continued with ``options(..., **LIMIT)``."""
    return shutil.copytree(killed_once, tmp_path / "run")


def test_a_run_writes_all_of_its_files(uninterrupted, chat_world):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names >= {
        "model.safetensors", "config.json", "tokenizer.json", "README.md", "results.json", "manifest.json",
        "run.json", "recipe.yaml", "recipe.resolved.yaml", "environment.json", "log.txt", "metrics.jsonl",
        "held_out_before.jsonl", "held_out_after.jsonl", "trainer_state.json",
    }  # fmt: skip
    assert "training_args.bin" not in names  # it is a pickle and contains tokens
    assert not list(uninterrupted.rglob("training_args.bin"))
    assert sum("loss" in line for line in metrics(uninterrupted)) == 4
    assert sum("eval_loss" in line for line in metrics(uninterrupted)) == 2
    before = [json.loads(line) for line in (uninterrupted / "held_out_before.jsonl").read_text().splitlines()]
    assert [line["where"] for line in before] == [f"test.jsonl:{n}" for n in range(1, 9)]
    mean = sum(line["rewards/margins"] for line in before) / len(before)
    assert {(n, s): v for n, s, v in final_metrics(uninterrupted)}["eval_rewards/margins", "before"] == pytest.approx(
        mean
    )


@pytest.mark.parametrize("step", [1, 5, 6, 7, 12])
def test_a_killed_run_resumes_to_identical_weights(step, uninterrupted, chat_world, after_step, tmp_path):
    """Killed before the first checkpoint, within both epochs, at an epoch's end, and after the last step."""
    output = tmp_path / "run"
    patches = after_step(step, die)
    with pytest.raises(Killed):
        cli.main(options(chat_world, output))
    patches.undo()
    assert cli.main(options(chat_world, output)) == 0
    assert same_weights(output, uninterrupted)
    assert metrics(output) == metrics(uninterrupted)
    assert final_metrics(output) == final_metrics(uninterrupted)


# The stages after the last step, in order: the function patched to fail, and where it lives.
ENDING = [
    (ResumableTrainer, "_complete"),  # while writing the last checkpoint
    (workflow, "shared_staging"),  # just before saving the model
    (workflow, "write_scores"),
    (workflow, "write_model_card"),
    (workflow, "write_results"),
    (RunFolder, "finish"),
]
# An epoch has six steps. These runs end within an epoch, by steps or by epochs, or at its end.
MID, FRACTION = {"max_steps": 4, "num_train_epochs": None}, {"num_train_epochs": 1.6}
EPOCHS = {"eval_strategy": "epoch"}
KINDS = {
    "simpo": ("train", MID | EPOCHS),
    "dpo": ("train", FRACTION | EPOCHS | {"objective": "dpo", "beta": 0.1, "logging_strategy": "epoch"}),
    "best": (
        "train",
        MID
        | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": "true"}
        | {"metric_for_best_model": "rewards/margins", "greater_is_better": "false"},
    ),
    "epochs": ("train", EPOCHS | {"num_train_epochs": 1.5, "save_strategy": "epoch"}),
    "whole": ("train", EPOCHS | {"num_train_epochs": 1}),
    "lora": ("train", MID | {"use_peft": "true", "lora_r": 2, "lora_target_modules": "c_attn"}),
    "sft": (
        "sft",
        FRACTION
        | {"dataset_name": "sft.jsonl", "eval_dataset_name": None}
        | {"dataset_train_split": "train[:20]", "dataset_test_split": "train[20:]"},
    ),
    "reward": ("reward", MID),
}


def of_kind(world: Path, kind: str, output: Path) -> list[str]:
    command, changes = KINDS[kind]
    data = {"dataset_name": world / changes["dataset_name"]} if "dataset_name" in changes else {}
    return [command, *options(world, output, **changes | data)[1:]]


def dying_at_the_last_step(name, original):
    """Return ``original``, except that it dies on the last step; earlier checkpoints and scores are written."""

    def call(*args, **kwargs):
        early = name == "_complete" and args[0].state.global_step < args[0].state.max_steps
        if early or "held_out_before" in str(args[0]):
            return original(*args, **kwargs)
        raise Killed

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_after_its_last_step_takes_no_more_steps(kind, chat_world, tmp_path, monkeypatch):
    """Killed at each stage of its ending in turn, and restarted each time."""
    uninterrupted, output = tmp_path / "uninterrupted", tmp_path / "run"
    assert cli.main(of_kind(chat_world, kind, uninterrupted)) == 0
    for place, name in ENDING if kind == "simpo" else ENDING[2:5:2]:  # for other kinds only the scores and the results
        with monkeypatch.context() as patches:
            patches.setattr(place, name, dying_at_the_last_step(name, getattr(place, name)))
            with pytest.raises(Killed):
                cli.main(of_kind(chat_world, kind, output))
    assert cli.main(of_kind(chat_world, kind, output)) == 0
    stored = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    for folder in ["", *(path.name for path in checkpoints(uninterrupted))]:
        assert (output / folder / stored).read_bytes() == (uninterrupted / folder / stored).read_bytes(), folder
    assert metrics(output) == metrics(uninterrupted)
    assert final_metrics(output) == final_metrics(uninterrupted)
    for name in ("held_out_before.jsonl", "held_out_after.jsonl"):
        assert (output / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.parametrize("name", ["held_out_after.jsonl", "examples_after.jsonl"])
def test_a_failure_while_scoring_the_trained_model_keeps_that_model(
    name, uninterrupted, chat_world, after_step, tmp_path
):
    """A folder blocks the place of a file; once it is removed, the run ends with the same files as any other."""
    output = tmp_path / "run"
    patches = after_step(12, (output / name).mkdir)
    assert cli.main(options(chat_world, output)) == 2
    patches.undo()
    assert same_weights(output, uninterrupted)
    for file in ("config.json", "tokenizer.json", "chat_template.jinja", "trainer_state.json"):
        assert (output / file).is_file() == (uninterrupted / file).is_file(), file
    (output / name).rmdir()
    assert cli.main(options(chat_world, output)) == 0
    assert {path.name for path in output.iterdir()} == {path.name for path in uninterrupted.iterdir()}
    assert same_weights(output, uninterrupted) and final_metrics(output) == final_metrics(uninterrupted)
    for file in ("held_out_after.jsonl", "examples_after.jsonl"):
        assert (output / file).read_bytes() == (uninterrupted / file).read_bytes()


class Averaging(torch.optim.SGD):
    """SGD whose weights in evaluation mode are twice those in training mode, similar to schedule-free optimizers."""

    _factor = 1.0

    def _to(self, factor):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(factor / self._factor)
        self._factor = factor

    def train(self):
        self._to(1.0)

    def eval(self):
        self._to(2.0)


@pytest.mark.parametrize("held_out", [True, False])
def test_the_saved_weights_are_the_evaluation_weights(held_out, chat_world, tmp_path, monkeypatch):
    """For optimizers whose training and evaluation weights differ, with and without held-out rows."""
    monkeypatch.setattr(
        workflow.PackedTrainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *given: (Averaging, {"lr": 0.0}))
    )
    changes = {"max_steps": 1, "num_train_epochs": None, "eval_strategy": "no", "save_strategy": "no"}
    if not held_out:
        changes |= {"eval_dataset_name": None}
    assert cli.main(options(chat_world, tmp_path / "run", **changes)) == 0
    start, saved = weights(chat_world / "model"), weights(tmp_path / "run")
    assert all(torch.equal(saved[name], 2 * start[name]) for name in saved)


@pytest.mark.parametrize("asked", [{"max_steps": 4}, {"max_steps": 3}])
def test_resuming_from_the_last_step_trains_nothing_and_beyond_it_is_an_error(
    asked, uninterrupted, chat_world, tmp_path, capsys
):
    """After the last step, nothing is trained; a checkpoint beyond it cannot belong to this run."""
    named = {"resume_from_checkpoint": uninterrupted / "checkpoint-4", "num_train_epochs": None}
    output = tmp_path / "run"
    code = cli.main(options(chat_world, output, **named | asked))
    if asked["max_steps"] == 4:
        assert code == 0
        assert same_weights(output, uninterrupted / "checkpoint-4")
        assert {n: v for n, s, v in final_metrics(output)}["train/steps"] == 4
    else:
        assert code == 2
        assert "checkpoint-4 was saved at step 4" in capsys.readouterr().err


@pytest.mark.parametrize("step", [3, 5])  # the handler acts on the step after: the last one, and the one before
def test_a_signal_at_the_last_step_loses_no_evaluation(step, chat_world, after_step, tmp_path):
    changes = {"max_steps": step + 1, "num_train_epochs": None, "eval_strategy": "epoch"}
    assert cli.main(options(chat_world, tmp_path / "uninterrupted", **changes)) == 0
    patches = after_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(options(chat_world, tmp_path / "run", **changes)) == 143
    patches.undo()
    assert cli.main(options(chat_world, tmp_path / "run", **changes)) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "uninterrupted")
    assert same_weights(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [3, 5])  # the handler acts on the step after: within an epoch, and at its end
def test_a_signal_saves_and_stops(signum, code, step, uninterrupted, chat_world, after_step, tmp_path, capsys):
    output = tmp_path / "run"
    patches = after_step(step, lambda: os.kill(os.getpid(), signum))
    changes = {"save_strategy": "no"}
    assert cli.main(options(chat_world, output, **changes)) == code
    patches.undo()
    saved = checkpoints(output)
    assert len(saved) == 1
    message = capsys.readouterr().err.strip()
    assert signal.Signals(signum).name in message
    assert saved[0].name.removeprefix("checkpoint-") in message
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)
    assert cli.main(options(chat_world, output, **changes)) == 0
    assert same_weights(output, uninterrupted)
    assert metrics(output) == metrics(uninterrupted)


def test_a_second_signal_ends_the_run_immediately():
    with pytest.raises(KeyboardInterrupt), StopOnSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop._received
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_signal_nothing_is_raised():
    with StopOnSignal() as stop:
        pass
    assert stop.step is None
    assert issubclass(InterruptedRun, Exception)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", [truncate, empty, flip_one_byte, Path.unlink])
def test_a_damaged_checkpoint_is_skipped(damage, name, uninterrupted, chat_world, killed, caplog):
    assert [path.name for path in checkpoints(killed)] == ["checkpoint-6", "checkpoint-4"]
    damage(killed / "checkpoint-6" / name)
    assert last_good_checkpoint(killed) == killed / "checkpoint-4"
    assert "checkpoint-6 is damaged" in caplog.text
    assert name in caplog.text
    if damage is flip_one_byte and name == "model.safetensors":  # once to the very end; each such run takes a second
        assert cli.main(options(chat_world, killed, **LIMIT)) == 0
        assert same_weights(killed, uninterrupted)
        assert f"continues from {killed / 'checkpoint-4'}" in (killed / "log.txt").read_text()
        assert "missing keys" not in caplog.text  # only one of two tied weights is stored


def test_a_checkpoint_not_yet_removed_at_a_kill_is_removed_later(chat_world, tmp_path, monkeypatch):
    output, changes = tmp_path / "run", {"save_total_limit": 1, "max_steps": 4, "num_train_epochs": None}
    with monkeypatch.context() as patches:
        rotate = resumable.rotate
        patches.setattr(resumable, "rotate", lambda *args, newest, **rest: die() if newest.name[-1] == "4" else None)
        with pytest.raises(Killed):
            cli.main(options(chat_world, output, **changes))
    assert resumable.rotate is rotate and len(checkpoints(output)) == 2
    assert cli.main(options(chat_world, output, **changes)) == 0
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4"]


def test_the_limit_keeps_the_newest_checkpoints(uninterrupted, chat_world, tmp_path):
    output = tmp_path / "run"
    assert cli.main(options(chat_world, output, save_total_limit=1)) == 0
    assert [path.name for path in checkpoints(output)] == ["checkpoint-12"]
    assert last_good_checkpoint(output) is not None


def test_the_limit_holds_when_the_last_checkpoint_was_written_before_a_kill(make_trainer, make_model, pairs, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    rows = pairs(8)
    make_trainer(rows, model=make_model("gpt2"), **settings).train()  # nothing is removed, as after such a kill
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    make_trainer(rows, model=make_model("gpt2"), save_total_limit=1, **settings).train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_the_best_checkpoint_is_kept_and_loaded(chat_world, tmp_path):
    output = tmp_path / "run"
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rewards/margins"}
    best |= {"load_best_model_at_end": "true", "greater_is_better": "false", "save_total_limit": 1}
    assert cli.main(options(chat_world, output, **best)) == 0
    state = json.loads((output / "trainer_state.json").read_text())
    kept = Path(state["best_model_checkpoint"])
    assert kept.parent == output
    logs = [line for line in metrics(output) if "eval_rewards/margins" in line]
    lowest = min(logs, key=lambda line: line["eval_rewards/margins"])["step"]
    assert kept.name == f"checkpoint-{lowest}"
    assert same_weights(kept, output)


@pytest.mark.parametrize("change", ["recipe", "data", "model"])
def test_a_different_run_is_not_continued(change, uninterrupted, chat_world, killed, tmp_path, capsys):
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((chat_world / "train.jsonl").open().readlines()[:-1]))
    changes = {
        "recipe": {"beta": 5.0},
        "data": {"dataset_name": fewer},
        "model": {"model_name_or_path": uninterrupted},
    }[change]
    assert cli.main(options(chat_world, killed, **LIMIT | changes)) == 2
    message = capsys.readouterr().err
    assert {"recipe": "beta", "data": "data/train", "model": "model: contents changed"}[change] in message
    assert message.count("\n") == 1
    if change == "recipe":
        assert cli.main(options(chat_world, killed, **LIMIT | changes, accept_changes="true")) == 0
        assert not same_weights(killed, uninterrupted)
        assert json.loads((killed / "run.json").read_text())["changes"]


def test_a_finished_run_says_so_and_is_left_alone(chat_world, uninterrupted, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert cli.main(options(chat_world, output)) == 0
    printed = capsys.readouterr()
    assert "finished" in printed.out
    assert "eval_rewards/margins" in printed.out
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"log.txt", ".lock", ".lock.pid"}
    report = output / "report.html"
    for damage in (report.unlink, lambda: os.utime(report, ns=(0, 0))):  # deleted, or older than the end of the run
        damage()
        assert cli.main(options(chat_world, output)) == 0
        assert report.stat().st_mtime_ns >= (output / "run.json").stat().st_mtime_ns
        assert str(report) in capsys.readouterr().out


def test_a_checkpoint_of_a_different_model_is_reported(make_trainer, make_model, pairs, tmp_path):
    rows = pairs(4)
    make_trainer(rows, model=make_model("gpt2"), save_strategy="steps", save_steps=1, max_steps=1).train()
    other = make_trainer(rows, model=make_model("gpt2", n_embd=16), max_steps=2)
    with pytest.raises(SimpoError, match=r"checkpoint-1 belongs to another model \(.* checkpoint, .* in this run"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    llama = make_trainer(rows, model=make_model("llama"), max_steps=2)
    with pytest.raises(SimpoError, match="is a gpt2 model, this run's is llama"):
        llama.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(SimpoError, match="there is no folder"):
        llama.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_resuming_without_a_checkpoint_is_an_error(make_trainer, pairs):
    with pytest.raises(SimpoError, match="no undamaged checkpoint"):
        make_trainer(pairs(4)).train(resume_from_checkpoint=True)


def test_a_full_disk_while_saving_damages_nothing(chat_world, uninterrupted, make_disk, capsys):
    """On a full disk, the previous checkpoint survives and the error is one line; with space again, the run goes on."""
    disk = make_disk("1m")
    output, ballast = disk / "run", disk / "ballast"
    size = sum(path.stat().st_size for path in (uninterrupted / "checkpoint-2").iterdir())
    ballast.write_bytes(b"0" * ((1 << 20) - int(1.6 * size) - 64 * 1024))
    assert cli.main(options(chat_world, output)) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in message if line.startswith("simpo: error")]) == 1
    assert "no space left on the disk" in message[-1]
    assert last_good_checkpoint(output) == output / "checkpoint-2"
    ballast.unlink()
    assert cli.main(options(chat_world, output, save_total_limit=1)) == 0
    assert same_weights(output, uninterrupted)


def test_a_different_training_run_in_the_same_folder_is_rejected(make_trainer, make_model, pairs, tmp_path):
    rows, settings = pairs(8), {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    make_trainer(rows, model=make_model("gpt2"), **settings).train()
    kept = load_file(tmp_path / "checkpoint-2/model.safetensors")
    again = make_trainer(rows, model=make_model("gpt2"), learning_rate=0.1, **settings)
    with pytest.raises(SimpoError, match="already holds checkpoints"):
        again.train()
    torch.testing.assert_close(load_file(tmp_path / "checkpoint-2/model.safetensors"), kept, rtol=0, atol=0)


def test_repeated_steps_are_saved_again(make_trainer, make_model, pairs, tmp_path):
    """Resuming from an earlier checkpoint with reordered rows replaces the later ones, and the limit holds."""
    rows = pairs(16)
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4, "save_total_limit": 2}
    make_trainer(rows, model=make_model("gpt2"), **settings | {"save_total_limit": None}).train()
    first = load_file(tmp_path / "checkpoint-3/model.safetensors")
    other = make_trainer(rows, model=make_model("gpt2"), data_seed=5, **settings | {"max_steps": 3})
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
    second = load_file(tmp_path / "checkpoint-3/model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)


BEST = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rewards/margins"}
BEST |= {"load_best_model_at_end": "true", "greater_is_better": "false", "save_total_limit": 1}


def test_the_best_checkpoint_is_found_in_a_moved_folder(chat_world, after_step, tmp_path, monkeypatch):
    patches = after_step(7, die)
    with pytest.raises(Killed):
        cli.main(options(chat_world, tmp_path / "before", **BEST))
    patches.undo()
    best = json.loads((checkpoints(tmp_path / "before")[0] / "trainer_state.json").read_text())["best_global_step"]
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path)
    assert cli.main(options(chat_world, "after", **BEST)) == 0
    state = json.loads((tmp_path / "after/trainer_state.json").read_text())
    assert state["best_global_step"] == best == 2
    assert same_weights(tmp_path / "after/checkpoint-2", tmp_path / "after")


@pytest.mark.parametrize("changes", [BEST, BEST | {"save_strategy": "best", "load_best_model_at_end": "false"}])
def test_checkpoints_reported_as_saved_exist(changes, chat_world, after_step, tmp_path, capsys):
    """Also with a limit of one plus the best, and if only the best is saved."""
    output = tmp_path / "run"
    patches = after_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(options(chat_world, output, **changes)) == 143
    patches.undo()
    assert "saved at step 4" in capsys.readouterr().err
    assert last_good_checkpoint(output) == output / "checkpoint-4"


def test_metrics_before_training_follow_the_settings_of_the_continued_run(chat_world, killed, tmp_path):
    assert cli.main(options(chat_world, killed, **LIMIT, beta=10.0, accept_changes="true")) == 0
    assert cli.main(options(chat_world, tmp_path / "other", max_steps=1, beta=10.0)) == 0
    before = [{n: v for n, s, v in final_metrics(folder) if s == "before"} for folder in (killed, tmp_path / "other")]
    assert before[0] == before[1]


def test_the_checkpoint_a_run_starts_from_belongs_to_its_identity(chat_world, uninterrupted, tmp_path, capsys):
    output = tmp_path / "run"
    named = {"resume_from_checkpoint": uninterrupted / "checkpoint-2"}
    assert cli.main(options(chat_world, output, **named)) == 0
    assert same_weights(output, uninterrupted) and metrics(output) == metrics(uninterrupted)
    assert "damaged" not in (output / "log.txt").read_text()  # a new run has no log lines yet, so none are missing
    capsys.readouterr()
    assert cli.main(options(chat_world, output, resume_from_checkpoint=uninterrupted / "checkpoint-4")) == 2
    assert "resume_from_checkpoint: contents changed" in capsys.readouterr().err
    assert cli.main(options(chat_world, tmp_path / "new", resume_from_checkpoint=tmp_path / "nowhere")) == 2
    assert not (tmp_path / "new").exists()


def test_a_mixture_of_experts_resumes_with_its_experts(make_trainer, make_model, pairs, tmp_path):
    """transformers stores experts under different names, and ``Trainer`` would not load them."""
    rows, settings = pairs(8), {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "num_train_epochs": 2}
    settings["logging_steps"] = 3  # the first log covers steps before and after the checkpoint
    uninterrupted = make_trainer(rows, model=make_model("mixtral", torch.float32), **settings)
    uninterrupted.train()
    make_trainer(
        rows, model=make_model("mixtral", torch.float32), save_strategy="steps", save_steps=2, **settings
    ).train()
    resumed = make_trainer(rows, model=make_model("mixtral", torch.float32), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, expected), found in zip(uninterrupted.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
    logged, again = uninterrupted.state.log_history[0], resumed.state.log_history[0]
    assert {"router/aux_loss", "router/max_load"} < logged.keys() and again == logged
    deeper = make_trainer(rows, model=make_model("mixtral", torch.float32, num_hidden_layers=2), **settings)
    with pytest.raises(SimpoError, match="belongs to another model"):
        deeper.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("content", ["{}", "[]", '{"global_step": "x"}'])
def test_a_trainer_state_without_its_fields_gives_a_one_line_error(
    content, uninterrupted, chat_world, tmp_path, capsys
):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints(uninterrupted)[-1], checkpoint)
    (checkpoint / "trainer_state.json").write_text(content)
    write_manifest(checkpoint)
    assert cli.main(options(chat_world, tmp_path / "run", resume_from_checkpoint=checkpoint)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "trainer_state.json" in error


def test_a_pickle_that_is_not_a_trainer_state_gives_a_one_line_error(uninterrupted, chat_world, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints(uninterrupted)[-1], checkpoint)
    torch.save({"last_epoch": Evil()}, checkpoint / "scheduler.pt")
    write_manifest(checkpoint)
    argv = options(chat_world, tmp_path / "run", resume_from_checkpoint=checkpoint)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(checkpoint) in error
    assert not (tmp_path / "ran").exists()
