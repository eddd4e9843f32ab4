"""Memory over thousands of steps with varied lengths, with an allocator that returns freed memory to the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

STEPS, WARM_UP = 3600, 2100
# Prints the resident memory in KiB after every step.
SCRIPT = """
import json, random, resource, sys
from pathlib import Path
import torch, transformers
from datasets import Dataset
from simpo import PreferenceConfig, PreferenceTrainer

torch.set_num_threads(1)
draw = random.Random(0)
ids = lambda longest: [draw.randint(3, 60) for _ in range(draw.randint(1, longest))]
rows = [{"prompt_ids": ids(60), "response_ids": [ids(30), ids(30)]} for _ in range(int(sys.argv[1]))]
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
resident = []


class Watch(transformers.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024)


quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10**6}
args = PreferenceConfig(sys.argv[2], per_device_train_batch_size=2, num_train_epochs=2, **quiet)
PreferenceTrainer(model, args, Dataset.from_list(rows), callbacks=[Watch()]).train()
print("resident:", json.dumps(resident))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory use from Linux's /proc")
def test_memory_does_not_grow(tmp_path):
    fixed = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = os.environ | fixed | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(STEPS), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("resident: "))
    resident = np.array(json.loads(line.removeprefix("resident: ")))
    assert len(resident) == STEPS
    # Memory settles within 2,000 steps: it grows by 2 MiB, or 4 MiB when CPython's table of interned strings doubles.
    settled = resident[WARM_UP:].reshape(3, -1).max(axis=1)  # maximum of each third
    assert settled[-1] - settled[0] <= 256, settled  # KiB; leaking one tensor per step would be 1000 times as much
