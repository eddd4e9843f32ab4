"""Running out of memory: real failures in a process with little memory, and the advice given."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset

from simpo.errors import SimpoError
from simpo.models.devices import explain_oom
from simpo.training.batches import ComparisonRows

# Trains on rows of 250 tokens in a process with a limit on additional memory in MiB, first with the given
# micro-batch size, then with whatever the errors recommend until training fits.
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
while True:
    try:
        first.train()
    except SimpoError as error:
        print("said:", error)
        tokens = int(str(error).split()[-1])
        del first
        first = trainer(tokens)
    else:
        break
print("trained:", tokens)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's memory limits")
def test_the_recommended_setting_fits(tmp_path):
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, "130", "8000", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("said: max_batch_tokens: a micro-batch of 8000 tokens does not fit into memory")
    assert first.endswith(" set it to 4000")
    trained = others[-1]
    assert trained.startswith("trained: ")
    assert 250 <= int(trained.removeprefix("trained: ")) <= 4000


@pytest.mark.parametrize(
    ("micro_batch", "longest", "advice"),
    [
        ([10] * 40, 30, "400 tokens does not fit into memory; set it to 200"),
        ([10] * 4, 30, "; set it to 30, the longest row, and set activation_checkpointing"),
        ([30], 30, " fit into memory: set activation_checkpointing"),
    ],
)
def test_advice_depends_on_the_micro_batch(make_trainer, micro_batch, longest, advice):
    lengths = [*micro_batch, longest]
    rows = Dataset.from_dict(
        {
            "prompt_ids": [[3] * (length - 2) for length in lengths],
            "response_ids": [[[4], [5]]] * len(lengths),
        }
    )
    trainer = make_trainer(rows, max_batch_tokens=sum(micro_batch), max_length=longest)
    batch = ComparisonRows(rows).unplanned_batch(range(len(micro_batch)))
    assert advice in trainer._memory_advice(batch)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes"), explain_oom(lambda: "advice"):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_activations_are_freed_before_advice_is_computed(error):
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
