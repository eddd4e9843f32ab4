"""Running means that continue from a checkpoint: also with other metrics than the run that saved it has."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tests.training_runs import killed_after_step

from simpo import cli
from simpo.errors import SimpoError
from simpo.runs.manifest import write_manifest
from simpo.training.metrics import RunningMeans

MEANS = "running_means.json"


def whole(values):
    return values


def running(names, rows=None, *, logged=None):
    """Running means of ``rows`` (equal weights) after a log of the rows ``logged``."""
    means = RunningMeans(names, torch.device("cpu"))
    for values in (logged, rows):
        if values is not None:
            means.take(whole)
            means.add(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.float64))
    return means


@pytest.mark.parametrize("names", [("loss", "a", "b"), ("loss", "b"), ("loss", "c", "b"), ("loss", "b", "a", "d")])
def test_sums_are_matched_by_name(names):
    """Each mean is over the rows before and after that have it, whatever its place."""
    before = {"loss": [1.0, 2.0], "a": [3.0, 5.0], "b": [7.0, 11.0]}
    saved = running(before, [[1.0, 3.0, 7.0]], logged=[[2.0, 5.0, 11.0]])
    resumed = RunningMeans(names, torch.device("cpu"))
    resumed.restore(json.loads(json.dumps(saved.state(whole))), main=True)
    resumed.add(torch.tensor([[13.0 + place for place in range(len(names))]]).double(), torch.ones(1).double())
    overall, since_log = resumed.overall(whole), resumed.take(whole)
    for place, name in enumerate(names):
        values = [*before.get(name, []), 13.0 + place]
        assert overall[name] == pytest.approx(sum(values) / len(values), rel=1e-15)
        values = [*before.get(name, [])[:1], 13.0 + place]
        assert since_log[name] == pytest.approx(sum(values) / len(values), rel=1e-15)
    assert overall.keys() == since_log.keys() == set(names)


def test_the_main_process_holds_the_sums_since_the_last_log():
    state = running(("loss", "a"), [[1.0, 3.0]], logged=[[5.0, 7.0]]).state(whole)
    ranks = [RunningMeans(("a", "loss"), torch.device("cpu")) for _ in range(2)]
    for number, rank in enumerate(ranks):
        rank.restore(state, main=number == 0)
    both = ranks[0]._since_log + ranks[1]._since_log
    for rank in ranks:
        assert rank.overall(lambda own: both) == {"loss": 3.0, "a": 5.0}


def test_sums_without_names_need_the_same_number_of_metrics():
    state = running(("loss", "a"), [[1.0, 3.0]]).state(whole)
    del state["names"]  # as saved by earlier versions
    same = RunningMeans(("loss", "a"), torch.device("cpu"))
    same.restore(state, main=True)
    assert same.take(whole) == {"loss": 1.0, "a": 3.0}
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        RunningMeans(("loss", "a", "b"), torch.device("cpu")).restore(state, main=True)


def options(world, command, output, **changes):
    data = {"dataset_name": world / "train.jsonl", "eval_dataset_name": world / "test.jsonl"}
    if command == "sft":
        data = {"dataset_name": world / "sft.jsonl"}
    given = data | {
        "model_name_or_path": world / "model", "output_dir": output, "per_device_train_batch_size": 4, "max_steps": 4,
        "learning_rate": 1e-3, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no",
        "guard": "off",
    } | changes  # fmt: skip
    return [command, *(f"--{key}={value}" for key, value in given.items())]


def first_log(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


CHANGES = {
    "one more": (("train", {}), ("train", {"kl_weight": 0.1})),
    "another": (("train", {"kl_weight": 0.1}), ("train", {"wpo_weights": "true"})),
    "fewer": (("train", {}), ("sft", {})),
    "most new": (("sft", {}), ("train", {})),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_measures_other_metrics_continues_from_a_checkpoint(change, chat_world, tmp_path):
    """The first log counts the two steps before the checkpoint only in metrics that were already measured there."""
    (command, before), (other, after) = CHANGES[change]
    with killed_after_step(2):
        cli.main(options(chat_world, command, tmp_path / "run", **before))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    stored = json.loads((checkpoint / MEANS).read_text())
    sums = dict(zip(stored["names"], zip(*stored["since_log"], strict=True), strict=True))
    alone = shutil.copytree(checkpoint, tmp_path / "alone" / "checkpoint-2")  # as if step 2 had been logged
    stored["since_log"] = [[0.0] * len(stored["names"])] * 2
    (alone / MEANS).write_text(json.dumps(stored))
    write_manifest(alone)
    found = []
    for start in (checkpoint, alone):
        output = tmp_path / f"from-{start.parent.name}"
        assert cli.main(options(chat_world, other, output, resume_from_checkpoint=start, **after)) == 0
        found.append(first_log(output))
    mean, last = found
    measured = {"train": {"loss", "rewards/margins", *({"kl"} if "kl_weight" in after else ())}, "sft": {"loss"}}[other]
    assert measured <= mean.keys() and ("kl" in mean) == ("kl_weight" in after)
    assert ("wpo/weight" in mean) == ("wpo_weights" in after)
    for name in measured:
        if name not in sums:
            assert mean[name] == last[name]
        elif other == command:  # the same rows per step, hence the same weight
            total, weight = sums[name]
            assert mean[name] == pytest.approx((total + last[name] * weight / 2) / (weight * 1.5), rel=1e-6)
    if other == command:
        argv = options(chat_world, command, tmp_path / "run", accept_changes="true", **after)
        assert cli.main(argv) == 0
        assert {name: first_log(tmp_path / "run")[name] for name in measured} == {name: mean[name] for name in measured}


@pytest.mark.slow
def test_a_checkpoint_without_names_and_with_other_metrics_is_rejected(make_trainer, pairs, tmp_path):
    rows = pairs(8)
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    make_trainer(rows, max_steps=1, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    stored = json.loads((checkpoint / MEANS).read_text())
    assert stored.pop("names")[0] == "loss"
    (checkpoint / MEANS).write_text(json.dumps(stored))
    write_manifest(checkpoint)
    with pytest.raises(SimpoError, match=r"resume_from_checkpoint: .*checkpoint-1"):
        make_trainer(rows, max_steps=2, kl_weight=0.1, **settings).train(resume_from_checkpoint=str(checkpoint))
    make_trainer(rows, max_steps=2, **settings).train(resume_from_checkpoint=str(checkpoint))
