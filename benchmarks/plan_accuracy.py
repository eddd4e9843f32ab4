"""What simpo plan predicts against what real runs take on this CPU: python -m benchmarks.plan_accuracy [--times]

Memory is measured by the allocator's own hooks (PyTorch's profiler records every allocation), with the weights copied
out of the files that they are mapped from. Times are medians of a run without the profiler.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.autograd.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from simpo.models.settings import ModelArguments
from simpo.planning.recipe import KINDS, make_plan
from simpo.planning.search import Estimate
from simpo.planning.settings import PlanSettings


@dataclass(frozen=True)
class Run:
    """A run whose memory and time are predicted and measured."""

    name: str
    command: str = "train"
    model: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    responses: int = 2
    processes: int = 1


RUNS = (
    Run("SimPO"),
    Run("SimPO, one micro-batch", config={"max_batch_tokens": 8192}),
    Run("SimPO, checkpointing", config={"activation_checkpointing": True}),
    Run("SimPO, half of it, SGD", config={"activation_checkpointing": True, "checkpointed_share": 0.5, "optim": "sgd"}),
    Run("SimPO, LoRA", model={"use_peft": True}),
    Run("SimPO, LoRA, checkpointing", model={"use_peft": True}, config={"activation_checkpointing": True}),
    Run("SimPO, K = 8", config={"max_batch_tokens": 1024}, responses=8),
    Run("SimPO, bf16, Adafactor", config={"bf16": True, "optim": "adafactor"}),
    Run("DPO, cached", config={"objective": "dpo", "beta": 0.1}),
    Run("DPO, live", config={"objective": "dpo", "beta": 0.1, "precompute_ref_log_probs": False}),
    Run("SFT", "sft", responses=1),
    Run("reward model", "reward"),
    Run("SimPO, 2 processes", processes=2),
)


def make_model(folder: Path, layers: int = 6, hidden: int = 256, vocabulary: int = 4000) -> None:
    """A random Llama."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_rows(count: int, responses: int, vocabulary: int = 4000, longest: int = 90) -> Dataset:
    """Random tokenized rows."""
    draw = np.random.default_rng(0)

    def part() -> list[int]:
        return draw.integers(3, vocabulary, draw.integers(longest // 4, longest)).tolist()

    rows = [{"prompt_ids": part(), "response_ids": [part() for _ in range(responses)]} for _ in range(count)]
    if responses > 2:
        rows = [row | {"scores": [float(-k) for k in range(responses)]} for row in rows]
    return Dataset.from_list(rows)


def config_of(run: Run, folder: Path, steps: int = 3) -> Any:
    """The run's configuration, eight rows a step over all processes."""
    keys = {"max_batch_tokens": 512} | dict(run.config)
    return KINDS[run.command].config_type(
        str(folder / "out"),
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=8 // run.processes,
        max_steps=steps,
        disable_tqdm=True,
        logging_strategy="no",
        **keys,
    )


def predicted(run: Run, folder: Path, rows: Dataset) -> Estimate:
    """What simpo plan says of the run."""
    parts = (ModelArguments(str(folder), **run.model), None, config_of(run, folder))
    sharding = None if run.processes == 1 else "ddp"
    _, found = make_plan(parts, PlanSettings(run.command, gpus=run.processes, sharding=sharding), rows)  # type: ignore[arg-type]
    return found


def clock() -> float:
    """Seconds; of one thread where there is only one, so that other processes of the machine do not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class _Times(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(clock() - self._start)


def train(run: Run, folder: Path, rows: Dataset, steps: int = 3) -> list[float]:
    """Seconds of the run's steps."""
    kind, times = KINDS[run.command], _Times()
    model: Any = copy.deepcopy(kind.load(str(folder), ModelArguments(str(folder), **run.model)))
    kind(model, args=config_of(run, folder, steps), train_dataset=rows, callbacks=[times]).train()
    return times.seconds


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's CPU allocator holds of what is allocated during ``run``."""
    with profile(profile_memory=True) as recorded:
        run()
    waiting, peak = list(recorded.kineto_results.experimental_event_tree()), 0
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            peak = max(peak, event.extra_fields.total_allocated)
    return peak


def _peak_of_processes(run: Run, folder: Path) -> int:
    """Run in several processes and return the largest peak of them, in bytes."""
    several = ["-m", "torch.distributed.run", f"--nproc_per_node={run.processes}"]
    worker = ["-m", "benchmarks.plan_accuracy", "--worker", run.name, "--folder", str(folder)]
    output = subprocess.run([sys.executable, *several, *worker], check=True, capture_output=True, text=True).stdout
    return max(json.loads(line)["peak"] for line in output.splitlines() if line.startswith('{"peak"'))


def _compare(run: Run, folder: Path, times: bool) -> tuple[float, float]:
    """What is measured and what is predicted: seconds of a step, or MiB."""
    rows = make_rows(24, run.responses)
    estimate = predicted(run, folder, rows)
    if times:
        assert estimate.step_seconds is not None, "first: simpo plan --calibrate"
        return float(np.median(train(run, folder, rows, 9)[3:])), estimate.step_seconds
    alone = run.processes == 1
    peak = peak_bytes(lambda: train(run, folder, rows)) if alone else _peak_of_processes(run, folder)
    return peak / 2**20, estimate.total / 2**20


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", action="store_true", help="times of steps instead of memory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        run = next(run for run in RUNS if run.name == asked.worker)
        rows = make_rows(24, run.responses)
        print(json.dumps({"peak": peak_bytes(lambda: train(run, asked.folder, rows))}))
        return
    folder = Path(tempfile.mkdtemp())
    make_model(folder)
    for run in RUNS:
        if not asked.times or run.processes == 1:  # several would share this machine's cores
            measured, found = _compare(run, folder, asked.times)
            print(f"| {run.name} | {measured:.4g} | {found:.4g} | {found / measured - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
