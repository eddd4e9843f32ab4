"""Memory that runs out: real failures in processes with little of it, and the search for what fits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpo.errors import SimpoError
from simpo.training.memory import memory_answered, tokens_that_fit

# Trains on rows of 250 tokens in a process that may take so many MiB more than it has when training starts.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch, transformers
from datasets import Dataset
from simpo import PreferenceConfig, PreferenceTrainer
from simpo.errors import SimpoError

torch.set_num_threads(1)
more, tokens, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
rows = Dataset.from_dict({"prompt_ids": [[3] * 50] * 64, "response_ids": [[[4] * 100, [5] * 100]] * 64})
quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
args = PreferenceConfig(folder, max_batch_tokens=tokens, per_device_train_batch_size=64, **quiet)
trainer = PreferenceTrainer(model, args, rows)
status = Path("/proc/self/status").read_text()
used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + more * 2**20,) * 2)
try:
    trainer.train()
except SimpoError as error:
    print(error)
"""


def trained(more: int, tokens: int, folder: Path) -> str:
    command = [sys.executable, "-c", SCRIPT, str(more), str(tokens), str(folder)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return "".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith("{"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the process's memory as Linux does")
def test_the_setting_that_is_named_fits(tmp_path):
    said = trained(400, 16000, tmp_path / "a")
    prefix = "max_batch_tokens: a micro-batch of 16000 tokens does not fit into memory; set it to "
    assert said.startswith(prefix), said
    found = int(said.removeprefix(prefix))
    assert 250 <= found < 16000
    assert trained(400, found, tmp_path / "b") == ""


def fitting(most: int, lengths: list[int]):
    def attempt(rows: list[int]) -> None:
        tried.append(sum(lengths[row] for row in rows))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    tried: list[int] = []
    return attempt, tried


def test_halves_until_it_fits():
    lengths = [100] * 40
    attempt, tried = fitting(900, lengths)
    assert tokens_that_fit(lengths, 300, attempt).endswith("4000 tokens does not fit into memory; set it to 500")
    assert tried == [2000, 1000, 500]
    assert tokens_that_fit(lengths, 300, None).endswith("set it to 2000")


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([400, 300], "; set it to 400, the longest row, and set activation_checkpointing"),
        ([400], ": and set activation"),
    ],
)
def test_not_even_the_longest_row(lengths, said):
    attempt, _ = fitting(10, lengths)
    assert said in tokens_that_fit(lengths, 400, attempt)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_answered(lambda: "advice"):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_had_been_computed_is_freed_first(error):
    alive = []

    class Activation:
        def __del__(self):
            alive.append("freed")

    def forward():
        activation = Activation()
        raise error

    with pytest.raises(SimpoError, match="^freed$"), memory_answered(lambda: " ".join(alive)):
        forward()
