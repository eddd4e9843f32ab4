"""``simpo sweep``: trials are ordinary runs, a killed process loses none of them, and the best one is found."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from filelock import FileLock

from simpo.cli import main
from simpo.errors import SimpoError
from simpo.runs.files import read_lines
from simpo.runs.results import read_results
from simpo.training.packed import PackedTrainer
from simpo.workflows.sweep import rank
from simpo.workflows.sweep_study import Axis, Study

pytestmark = pytest.mark.slow

# A forked process has already imported everything, so that a kill hits a trial rather than imports.
FORK = multiprocessing.get_context("fork")
METRIC = "eval_rewards/accuracies"
WIN_RATE = "eval_generations/win_rate"
RATES = ("1e-5", "1e-3", "1e-2")


def sweep(world, output, *more, rates=RATES):
    return [
        "sweep",
        str(world / "recipe.yaml"),
        f"--learning_rate={','.join(rates)}",
        "--output_dir",
        str(output),
        *more,
    ]


def metrics(folder):
    return {metric.name: metric for metric in read_results(folder / "results.json").metrics}


def record(folder):
    return json.loads((folder / "run.json").read_text())


def test_trials_are_ordinary_runs_and_the_best_is_found(world, tmp_path, capsys):
    output = tmp_path / "sweep"
    argv = sweep(world, output, "--gamma_beta_ratio", "0.3,0.5", rates=RATES[1:])
    assert main(argv) == 0
    printed = capsys.readouterr().out
    found = metrics(output)
    trials = {number: metrics(output / f"trials/{number:03d}")[METRIC] for number in range(4)}
    for number, metric in trials.items():
        assert found[f"trials/{number:03d}/{METRIC}"].value == metric.value
        assert found[f"trials/{number:03d}/{METRIC}"].low == metric.low
        assert record(output / f"trials/{number:03d}")["command"] == "train"
        assert "# a comment" in (output / f"trials/{number:03d}/recipe.yaml").read_text()
    best = int(found["best/trial"].value)
    assert found[f"best/{METRIC}"].value == max(metric.value for metric in trials.values())
    rows = [int(words[0]) for words in map(str.split, printed.splitlines()) if words[1:2] and words[1] in RATES]
    assert rows == sorted(trials, key=lambda number: (-trials[number].value, number))  # the table, best first

    recipe = yaml.safe_load((output / "best.yaml").read_text())
    rate, ratio = RATES[1:][best // 2], (0.3, 0.5)[best % 2]
    assert (float(recipe["learning_rate"]), recipe["gamma_beta_ratio"], recipe["beta"]) == (float(rate), ratio, 2.5)
    assert main(["train", str(output / "best.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again", output / f"trials/{best:03d}")
    ]
    assert weights[0] == weights[1]

    capsys.readouterr()
    assert main(argv) == 0  # already finished: only prints the table
    again = capsys.readouterr().out
    assert "step" not in again
    assert again.strip() in printed
    assert main([*argv, "--beta", "2"]) == 2
    assert "with different settings (beta:" in capsys.readouterr().err


def alive() -> int:
    """Return the number of trainers and models in memory."""
    return sum(issubclass(type(thing), PackedTrainer | torch.nn.Module) for thing in gc.get_objects())


def test_a_diverging_trial_is_recorded_and_the_sweep_continues(world, tmp_path, capsys):
    output = tmp_path / "sweep"
    gc.collect()
    before = alive()
    assert main(sweep(world, output, rates=("1e30", "1e-4"))) == 0
    assert alive() <= before  # memory is freed after each trial, including failed ones
    found = metrics(output)
    assert [found[f"trials/{state}"].value for state in ("finished", "pruned", "failed")] == [1, 0, 1]
    assert f"trials/000/{METRIC}" not in found
    printed = capsys.readouterr().out
    assert "trial 0 failed: step" in printed
    assert "not finite" in printed
    assert not (output / "trials/000/model.safetensors").exists()


def test_trials_below_the_median_are_pruned(world, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.pruners, "MedianPruner", partial(optuna.pruners.MedianPruner, n_startup_trials=1))
    output = tmp_path / "sweep"
    more = ("--prune", "--eval_strategy", "steps", "--eval_steps", "2", "--metric", "rewards/margins")
    assert main(sweep(world, output, *more, rates=("5e-3", "1e-9"))) == 0
    found = metrics(output)
    assert [found[f"trials/{state}"].value for state in ("finished", "pruned")] == [1, 1]
    assert record(output / "trials/001")["status"] == "running"
    assert "best/eval_rewards/margins" in found


def test_trials_can_be_compared_by_judged_answers(world, tmp_path):
    """At the last evaluation, because the usual metrics come from held-out pairs after training."""
    output = tmp_path / "sweep"
    judged = ("--eval_generations", "2", "--eval_judge", "exact", "--eval_strategy", "epoch")
    more = ("--metric", "generations/win_rate", "--prune", "--sampler", "tpe", "--trials", "1")
    assert main(sweep(world, output, *judged, *more)) == 0
    logged = [line[WIN_RATE] for line in read_lines(output / "trials/000/metrics.jsonl") if WIN_RATE in line]
    assert metrics(output)[f"best/{WIN_RATE}"].value == logged[-1]
    assert (output / "trials/000/generations/step-4.jsonl").exists()


def test_tpe_samples_and_does_not_repeat_trials(world, tmp_path, capsys):
    output = tmp_path / "sweep"
    argv = sweep(world, output, "--sampler", "tpe", "--trials", "4", rates=("1e-3", "1e-4"))
    assert main(argv) == 0
    found = metrics(output)
    assert found["trials/finished"].value == len(list((output / "trials").glob("*/run.json"))) <= 2
    assert "not run again" in capsys.readouterr().out


def _child(argv: list[str]) -> None:
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = main(argv)
    sys.exit(code)


def _start(argv):
    process = FORK.Process(target=_child, args=(argv,))
    process.start()
    return process


def _wait_for(path: Path, process) -> None:
    while not path.exists() and process.is_alive():
        time.sleep(0.005)


def test_after_a_kill_and_restart_every_trial_counts_once(world, tmp_path):
    alone = tmp_path / "alone"
    more = ("--save_strategy", "steps", "--save_steps", "1")
    recipe = str(world / "recipe.yaml")
    assert main(["train", recipe, "--learning_rate", RATES[1], "--output_dir", str(alone), *more]) == 0
    output = tmp_path / "killed"
    argv = sweep(world, output, *more, rates=RATES[:2])
    process = _start(argv)
    _wait_for(output / "trials/001/checkpoint-2", process)
    process.kill()
    process.join()
    assert process.exitcode == -9
    first = record(output / "trials/000")
    assert main(argv) == 0
    assert record(output / "trials/000") == first  # unchanged
    assert "continues from" in (output / "trials/001/log.txt").read_text()
    assert len(list((output / "trials").glob("[0-9]*"))) == 2
    assert metrics(output)[f"trials/001/{METRIC}"].value == metrics(alone)[METRIC].value
    weights = [(folder / "model.safetensors").read_bytes() for folder in (alone, output / "trials/001")]
    assert weights[0] == weights[1]


def test_a_start_model_or_data_changed_between_trials_is_rejected(world, tmp_path, capsys):
    own, output = shutil.copytree(world, tmp_path / "world"), tmp_path / "killed"
    recipe = own / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(world), str(own)))
    argv = sweep(own, output, rates=RATES[:2])
    process = _start(argv)
    _wait_for(output / "trials/001/run.json", process)
    process.kill()
    process.join()
    changes = {"model/model.safetensors": "(model ", "train.jsonl": "(data/train", "test.jsonl": "(data/eval"}
    for name, key in changes.items():
        content = (own / name).read_bytes()
        changed = content[content.index(b"\n") + 1 :] if name.endswith("jsonl") else content[:-1] + b"\1"
        (own / name).write_bytes(changed)
        assert main(argv) == 2
        assert key in capsys.readouterr().err
        (own / name).write_bytes(content)
    assert main(argv) == 0


def test_changed_data_is_rejected_if_the_data_is_an_axis(world, tmp_path, capsys):
    output, pairs = tmp_path / "sweep", (world / "train.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.write_text("".join(pairs))
    argv = sweep(world, output, f"--dataset_name={files[0]},{files[1]}", rates=["1e-4"])
    process = _start(argv)
    _wait_for(output / "trials/001/run.json", process)
    process.kill()
    process.join()
    files[1].write_text("".join(reversed(pairs)))
    assert main(argv) == 2
    assert "(data 1/train" in capsys.readouterr().err
    files[1].write_text("".join(pairs))
    assert main(argv) == 0
    assert metrics(output)["trials/finished"].value == 2


def test_two_processes_share_the_trials_and_a_different_sweep_is_rejected(world, tmp_path, capsys):
    output = tmp_path / "sweep"
    rates = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "1e-2")  # enough that the later process finds some left
    argv = sweep(world, output, rates=rates)
    processes = [_start(argv) for _ in range(2)]
    _wait_for(output / "trials/000/run.json", processes[0])
    assert main(sweep(world, output, rates=RATES[:2])) == 2
    assert "in use by a sweep with other settings (axis learning_rate" in capsys.readouterr().err
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert metrics(output)["trials/finished"].value == len(rates)
    folders = sorted((output / "trials").glob("[0-9]*"))
    assert [folder.name for folder in folders] == [f"{number:03d}" for number in range(len(rates))]
    assert all(len(record(folder)["starts"]) == 1 for folder in folders)  # each was run by one of the two
    environments = {(folder / ".lock.pid").read_text() for folder in folders}
    assert len(environments) == 2  # and both ran some
    assert record(output)["status"] == "finished"


def test_a_folder_in_use_by_another_command_is_rejected(world, tmp_path, capsys):
    output = tmp_path / "sweep"
    output.mkdir()
    with FileLock(output / ".lock"):
        assert main(sweep(world, output)) == 2
    assert f"output_dir: {output} is in use" in capsys.readouterr().err
    assert not (output / "study.db").exists()


def test_a_process_without_trials_left_leaves_the_results_to_the_last_one(world, tmp_path, capsys):
    output = tmp_path / "sweep"
    argv = sweep(world, output, rates=RATES[:2])
    assert main(argv) == 0
    study = Study(output, (Axis("learning_rate", RATES[:2]),), "grid", 3, smaller_is_better=False)
    document = record(output) | {"status": "running"}
    (output / "run.json").write_text(json.dumps(document))
    elsewhere = study._study.ask({"learning_rate": optuna.distributions.CategoricalDistribution(RATES[:2])})
    lock = FileLock(output / f"trials/.{elsewhere.number:03d}.lock")
    capsys.readouterr()
    with lock:
        assert main(argv) == 0
    assert "1 trials are still running in other processes" in capsys.readouterr().out
    assert record(output)["status"] == "running"
    assert main(argv) == 0  # the other process has died, so its trial is run, or repeats another trial's values
    assert record(output)["status"] == "finished"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to vary"),
        (["--learning_rat", "1e-3,1e-4"], "learning_rat: unknown key; did you mean learning_rate?"),
        (["--bta", "2", "--learning_rate", "1e-3,1e-4"], "bta: unknown key; did you mean beta?"),
        (["--beta", "2,x"], "--beta: 'x' is not a number"),
        (["--beta", "2,-1"], "beta must be > 0"),
        (["--beta", "1..4"], "--sampler tpe"),
        (["--beta", "1,4", "--trials", "1"], "a grid runs all 2 combinations"),
        (["--beta", "1,4", "--sampler", "tpe", "--trials", "0"], "--trials: must be at least 1"),
        (["--beta", "1,4", "--metric", "win_rate"], "metric: 'win_rate'"),
        (["--beta", "1,4", "--prune"], "eval_strategy: steps"),
        (["--beta", "1,4", "--eval_dataset_name", "null"], "name held-out pairs"),
        (["--beta", "1,4", "--metric", "generations/win_rate"], "set eval_generations and eval_judge"),
        (["--beta", "1,4", "--eval_generations", "2"], "eval_generations: needs evaluations"),
        (["--tau", "1,4"], "tau is not a hyperparameter of objective 'simpo' (it belongs to ipo)"),
        (["--objective", "simpo,dpo", "--gamma_beta_ratio", "0.5"], "not a hyperparameter of objective 'dpo'"),
        (["--beta", "1,4", "--dataset_name", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_give_a_one_line_error_before_anything_runs(world, tmp_path, capsys, more, message):
    output = tmp_path / "sweep"
    assert main(["sweep", str(world / "recipe.yaml"), "--output_dir", str(output), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not list(output.glob("trials/[0-9]*"))


def test_a_metric_the_rows_do_not_have_is_rejected_before_training(world, tmp_path, capsys):
    pairs = map(json.loads, (world / "test.jsonl").read_text().splitlines())
    rows = [
        {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
        for pair in pairs
        for key in ("chosen", "rejected")
    ]
    judged = tmp_path / "judged.jsonl"
    judged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Not the same slice, because held-out rows that are all training rows are rejected.
    slices = ("--dataset_train_split=train[:50%]", "--dataset_test_split=train[50%:]")
    names = (f"--dataset_name={judged}", f"--eval_dataset_name={judged}", *slices, "--objective=kto", "--beta=0.1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((world / "recipe.yaml").read_text().replace("objective: simpo\nbeta: 2.5\n", ""))
    argv = ["sweep", str(recipe), *names, "--learning_rate=1e-3,1e-4", f"--output_dir={tmp_path / 'sweep'}"]
    assert main(argv) == 2
    assert (
        "--metric: eval_rewards/accuracies is not measured on these rows; choose from eval_loss"
        in capsys.readouterr().err
    )
    assert not list((tmp_path / "sweep/trials").glob("[0-9]*/run.json"))


def test_the_same_command_continues_after_a_mistake_in_the_data_is_fixed(world, tmp_path):
    argv = sweep(world, tmp_path / "sweep", "--dataset_name", str(tmp_path / "pairs.jsonl"))
    argv += ["--sampler", "tpe", "--trials", "1"]
    assert main(argv) == 2
    (tmp_path / "pairs.jsonl").write_text((world / "train.jsonl").read_text())
    assert main(argv) == 0
    assert metrics(tmp_path / "sweep")["trials/finished"].value == 1


def test_a_launcher_is_rejected(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(sweep(world, tmp_path / "sweep")) == 2
    error = capsys.readouterr().err
    assert "simpo sweep runs in one process" in error and error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_missing_optuna_is_reported_with_what_to_install(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(sweep(world, tmp_path / "sweep")) == 2
    assert "pip install 'simpo[sweep]'" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def trial(number, state, value=None, **notes):
    found = optuna.create_trial(state=optuna.trial.TrialState[state], value=value, user_attrs=notes)
    found.number = number
    return found


def test_it_is_an_error_if_no_trial_finishes():
    tried = [trial(0, "PRUNED"), trial(1, "FAIL", reason="step 1: the loss is not finite")]
    with pytest.raises(SimpoError, match="none of the 2 trials finished; trial 1: step 1"):
        rank(tried, smaller_is_better=False)


def test_the_smallest_can_be_best_and_ties_go_to_the_first():
    tried = [trial(number, "COMPLETE", value) for number, value in enumerate((0.5, 0.2, 0.2))]
    repeated = trial(3, "COMPLETE", 0.1, same_as=1)
    assert [trial.number for trial in rank([*tried, repeated], smaller_is_better=True)] == [1, 2, 0]
    assert [trial.number for trial in rank([*tried, repeated], smaller_is_better=False)] == [0, 1, 2]


def test_the_default_folder_is_the_recipes_with_a_sweep_suffix(world, monkeypatch):
    opened = []
    monkeypatch.setattr(Study, "__init__", lambda self, folder, *rest, **more: (opened.append(folder), sys.exit(0)))
    with pytest.raises(SystemExit):
        main(["sweep", str(world / "recipe.yaml"), "--beta", "1,2"])
    assert opened == [world / "out-sweep"]
