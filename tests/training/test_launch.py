"""``torchrun -m simpo.cli train`` on two processes: one run folder, failures that end both, and rejected launches."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tests.forked import run_ranks
from torch.testing import assert_close

from simpo import cli
from simpo.data.tokenizing import Tokenization
from simpo.runs.results import read_results
from simpo.training.packed import PackedTrainer

LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch"

# Rank 1 fails in its second step while rank 0 waits for its gradients.
MISTAKE = """
import os, sys
from simpo import SimpoError, cli
from simpo.training.packed import PackedTrainer

step = PackedTrainer.training_step

def sabotaged(self, *args):
    if os.environ["RANK"] == "1" and self.state.global_step == 3:
        raise SimpoError("planted: the mistake of one rank")
    return step(self, *args)

PackedTrainer.training_step = sabotaged
sys.exit(cli.main(sys.argv[1:]))
"""


def rerun_and_fail(folder: Path, arguments: list[str]) -> int:
    """Rerun a finished run, a run whose ranks have different recipes, and a run whose disk is full at a checkpoint."""
    rank, calls, tokenize = os.environ["RANK"], [], Tokenization.__call__

    def counted(self, *args):
        calls.append(1)
        return tokenize(self, *args)

    def full(self, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def elsewhere(name):
        return [f"--output_dir={folder}/{name}" if each.startswith("--output_dir=") else each for each in arguments]

    Tokenization.__call__, PackedTrainer._complete = counted, full
    finished = cli.main(arguments)
    assert not calls
    other = cli.main([*elsewhere("other"), f"--gamma_beta_ratio=0.{rank}", "--max_length=50"])
    print(f"rank {rank}: finished {finished} other {other} tokenized {len(calls)}", flush=True)
    return cli.main(elsewhere("full"))


FILES = {
    "one-gpu": (DistributedType.NO, 1, 1),
    "fsdp-8-gpus": (DistributedType.FSDP, 1, 8),
    "fsdp-2-nodes": (DistributedType.FSDP, 2, 16),
    "deepspeed-zero2": (DistributedType.DEEPSPEED, 1, 8),
    "deepspeed-zero3": (DistributedType.DEEPSPEED, 1, 8),
}


@pytest.mark.parametrize("name", FILES)
def test_launch_files_are_valid_for_accelerate(name):
    """accelerate's loader rejects unknown keys."""
    found = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (found.distributed_type, found.num_machines, found.num_processes) == FILES[name]
    if found.distributed_type == DistributedType.FSDP:
        assert (found.fsdp_config["fsdp_version"], found.fsdp_config["fsdp_state_dict_type"]) == (2, "FULL_STATE_DICT")
    if found.distributed_type == DistributedType.DEEPSPEED:
        assert found.deepspeed_config["zero_stage"] == int(name[-1])


def test_every_launch_file_is_tested():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == set(FILES)


def options(world: Path, output: Path, rows: int) -> list[str]:
    given = {
        "model_name_or_path": world / "model",
        "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl",
        "output_dir": output,
        "dtype": "float64",
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_generations": 3,
    }
    return ["train", *(f"--{key}={value}" for key, value in given.items())]


@pytest.mark.slow
def test_two_processes_share_one_run(chat_world, tmp_path):
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert cli.main(options(chat_world, alone, 4)) == 0
    given = options(chat_world, run, 2)
    (tmp_path / "mistake.py").write_text(MISTAKE)

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    failed = subprocess.run(
        [*command, str(tmp_path / "mistake.py"), *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert failed.returncode != 0
    assert failed.stderr.count("simpo: error: planted: the mistake of one rank") == 1
    assert (run / "checkpoint-2").is_dir()
    assert not (run / "checkpoint-4").exists()

    resumed = run_ranks(2, cli.main, given, folder=tmp_path, timeout=100)
    assert resumed.codes == [0, 0], resumed.stderr
    assert resumed.stdout.count(f"continues from {run / 'checkpoint-2'}") == 1
    assert resumed.stdout.count("saved:") == 1  # by one rank only
    assert {path.name for path in run.iterdir()} >= {path.name for path in alone.iterdir() if path.name[0] != "."}
    expected = load_file(alone / "model.safetensors")
    for name, tensor in load_file(run / "model.safetensors").items():
        assert_close(tensor, expected[name], rtol=0, atol=1e-9)
    values = [[metric.value for metric in read_results(folder / "results.json").metrics] for folder in (run, alone)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    losses = [
        [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in line]
        for folder in (run, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    answers = [
        {
            path.name: [json.loads(line)["response_ids"] for line in path.open()]
            for path in (folder / "generations").glob("*.jsonl")
        }
        for folder in (run, alone)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]["start.jsonl"]) == 3

    after = run_ranks(2, rerun_and_fail, tmp_path, given, folder=tmp_path, timeout=100)
    tokenized = dict(re.findall(r"rank (\d): finished 0 other 2 tokenized (\d+)", after.stdout))
    assert int(tokenized["0"]) > 0
    assert int(tokenized["1"]) == 0  # loaded from the cache
    assert after.stderr.count("simpo: error: gamma_beta_ratio: process 1 has '0.1', process 0 has '0.0'") == 2
    assert not (tmp_path / "other").exists()
    assert any(after.codes)
    assert after.stderr.count("no space left on the disk") == 1
    assert not list((tmp_path / "full").glob("checkpoint-*"))
