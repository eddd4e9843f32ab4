"""Real runs, really killed (SIGKILL) at random moments, and started again: the same bytes as of a run left alone.

``SIMPO_SOAK_KILLS`` says how often each kind of run is killed before it may finish; ``make soak`` asks for six.
"""

from __future__ import annotations

import json
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
TWICE = ("sampling", "annotation")  # short runs are killed twice as often
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
    if kind == "annotation":
        scorer = f"logp:{world / 'model'}"
        return ["annotate", str(_answers(world)), "--annotator", scorer, "--output_dir", str(output)]
    if kind == "loop":
        options |= {"prompts": world / "train.jsonl", "eval_prompts": world / "test.jsonl", "rounds": 2, "n": 3}
        options |= {"annotator": f"logp:{world / 'model'}", "max_new_tokens": 12, "chunk_size": 24, "temperature": 1}
        options |= {"keep_unfinished": "true"}
        options |= TRAIN | {"num_train_epochs": 1}
        return ["loop", *(f"--{key}={value}" for key, value in options.items())]
    if kind == "sft":
        options |= {"dataset_name": world / "sft.jsonl"} | TRAIN
    else:
        options |= {"dataset_name": world / "train.jsonl", "eval_dataset_name": world / "test.jsonl"} | TRAIN
    if kind == "accumulation":
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_batch_tokens": 96}
    if kind == "checkpoint":
        options |= {"save_steps": 1}
    return ["sft" if kind == "sft" else "train", *(f"--{key}={value}" for key, value in options.items())]


def _answers(world: Path) -> Path:
    """``responses.jsonl`` with enough prompts for several parts."""
    path = world / "responses.jsonl"
    if not path.exists():
        rows = [
            {
                "id": str(number),
                "prompt": f"What is {number} and 2?",
                "responses": [f"It is {number + k}." for k in range(4)],
            }
            for number in range(1200)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    """What the run is for; of a loop the products of every stage of every round."""
    if kind == "loop":
        patterns = ["results.json", "round-*/*.json", "round-*/*/*.safetensors", "round-*/*/results.json"]
        patterns += [f"**/{name}.jsonl" for name in ("responses", "annotated", "pairs", "verdicts")]
    else:
        patterns = {"sampling": ["responses.jsonl"], "annotation": ["annotated.jsonl", "best.jsonl"]}.get(
            kind, ["model.safetensors"]
        )
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    assert len(found) >= len(patterns)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)}


@pytest.mark.parametrize("kind", ["sft", "train", "accumulation", "checkpoint", "sampling", "annotation", "loop"])
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
    for _ in range(KILLS * (1 + (kind in TWICE))):
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
    checksums = {f".held_out_{stage}.jsonl.sha256" for stage in ("before", "after")}  # of the stored scores
    left = [path.name for path in output.rglob(".*") if "lock" not in path.name and path.name not in checksums]
    assert not left, f"seed {seed}: left behind"
