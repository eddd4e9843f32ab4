"""Memory that runs out: real failures in processes with little of it, and the search for what fits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from simpo.errors import SimpoError
from simpo.training.memory import explain_oom, tokens_that_fit

# Trains on rows of 250 tokens in a process that may take so many MiB more than it has when training starts: with
# micro-batches of so many tokens, and then with what the error names.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch, transformers
from datasets import Dataset
from simpo import PreferenceConfig, PreferenceTrainer
from simpo.errors import SimpoError

torch.set_num_threads(1)
more, tokens, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2}
rows = Dataset.from_dict({"prompt_ids": [[3] * 50] * 32, "response_ids": [[[4] * 100, [5] * 100]] * 32})
quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}


def trainer(tokens):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    args = PreferenceConfig(folder, max_batch_tokens=tokens, per_device_train_batch_size=32, **quiet)
    return PreferenceTrainer(model, args, rows)


first = trainer(tokens)
status = Path("/proc/self/status").read_text()
used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + more * 2**20,) * 2)
try:
    first.train()
except SimpoError as error:
    print("said:", error)
    found = int(str(error).split()[-1])
del first
trainer(found).train()
print("trained:", found)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the process's memory as Linux does")
def test_the_setting_that_is_named_fits(tmp_path):
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, "130", "8000", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, *_, trained = (line for line in done.stdout.splitlines() if line.startswith(("said: ", "trained: ")))
    start = "said: max_batch_tokens: a micro-batch of 8000 tokens does not fit into memory; set it to "
    assert said.startswith(start)
    assert trained == f"trained: {said.removeprefix(start)}"
    assert 250 <= int(said.removeprefix(start)) <= 4000


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
    assert tokens_that_fit(lengths, 300, attempt).endswith("4000 tokens does not fit into memory; set it to 400")
    assert tried == [2000, 1000, 500]
    assert tokens_that_fit(lengths, 450, attempt).endswith("set it to 450")  # no less than the longest row
    assert tokens_that_fit(lengths, 300, None).endswith("set it to 1600")


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([400, 300], "; set it to 400, the longest row, and set activation_checkpointing"),
        ([400], " fit into memory: set activation_"),
    ],
)
def test_not_even_the_longest_row(lengths, said):
    attempt, _ = fitting(10, lengths)
    assert said in tokens_that_fit(lengths, 400, attempt)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), explain_oom(lambda: "advice"):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_had_been_computed_is_freed_first(error):
    alive = []

    class Activation:
        def __del__(self):
            alive.append("freed")

    def forward():
        activation = Activation()
        assert activation
        raise error

    with pytest.raises(SimpoError, match=r"^freed$"), explain_oom(lambda: " ".join(alive)):
        forward()
