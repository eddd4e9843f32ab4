"""Real runs, really killed (SIGKILL) at random moments, and started again: the same bytes as of a run left alone.

``SIMPO_SOAK_KILLS`` says how often each kind of run is killed before it may finish; ``make soak`` asks for six.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from simpo import cli

KILLS = int(os.environ.get("SIMPO_SOAK_KILLS", "1"))
# A forked process has imported everything already, so that a kill falls into the run and not into imports.
FORK = multiprocessing.get_context("fork")

TRAIN = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "disable_dropout": "false",
}


def _commands(world: Path, kind: str, output: Path) -> list[str]:
    options = {"model_name_or_path": world / "model", "output_dir": output}
    if kind == "sampling":
        return [
            *("sample", str(world / "model"), str(world / "train.jsonl"), "--output_dir", str(output)),
            *("--n", "2", "--max_new_tokens", "24", "--chunk_size", "4"),
        ]
    if kind == "sft":
        options |= {"dataset_name": world / "sft.jsonl"} | TRAIN
    else:
        options |= {"dataset_name": world / "train.jsonl", "eval_dataset_name": world / "test.jsonl"} | TRAIN
    if kind == "accumulation":
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_batch_tokens": 96}
    if kind == "checkpoint":
        options |= {"save_steps": 1}
    return ["sft" if kind == "sft" else "train", *(f"--{key}={value}" for key, value in options.items())]


def _child(argv: list[str]) -> None:
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = cli.main(argv)
    sys.exit(code)


def _start(argv: list[str]):
    process = FORK.Process(target=_child, args=(argv,))
    process.start()
    return process


def _wait_for_a_checkpoint_in_writing(process, output: Path) -> None:
    while process.is_alive() and not list(output.glob(".checkpoint-*.partial")):
        pass


def _result(kind: str, folder: Path) -> dict[str, bytes]:
    names = ["responses.jsonl"] if kind == "sampling" else ["model.safetensors"]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("kind", ["sft", "train", "accumulation", "checkpoint", "sampling"])
def test_killed_and_started_again_it_ends_with_the_same_bytes(kind, chat_world, tmp_path):
    begun = time.monotonic()
    alone = _start(_commands(chat_world, kind, tmp_path / "alone"))
    alone.join()
    assert alone.exitcode == 0
    takes = time.monotonic() - begun
    seed = random.randrange(1 << 30)
    moments = random.Random(seed)
    output = tmp_path / "killed"
    argv = _commands(chat_world, kind, output)
    killed = 0
    for _ in range(KILLS):
        process = _start(argv)
        if kind == "checkpoint":
            for _ in range(moments.randrange(1, 4)):
                _wait_for_a_checkpoint_in_writing(process, output)
                time.sleep(moments.uniform(0, 0.01))
        else:
            time.sleep(moments.uniform(0, takes))
        process.kill()
        process.join()
        killed += process.exitcode == -9
    last = _start(argv)
    last.join()
    assert last.exitcode == 0, f"seed {seed}, killed {killed} times"
    assert _result(kind, output) == _result(kind, tmp_path / "alone"), f"seed {seed}, killed {killed} times"
    left = [path.name for path in output.iterdir() if path.name.startswith(".") and "lock" not in path.name]
    assert not left, f"seed {seed}: left behind"
