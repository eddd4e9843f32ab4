"""Compare simpo plan's predictions with real runs on this machine: python -m benchmarks.plan_accuracy [--times]

On a CPU, memory is measured by the allocator's own hooks (PyTorch's profiler records every allocation), after copying
the weights out of their memory-mapped files; times are medians from a run without the profiler. On a GPU, with larger
runs, one run measures both, with the allocator's statistics; the plan's allowances for the CUDA context and
fragmentation are excluded.
"""

from __future__ import annotations

import argparse
import copy
import gc
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from benchmarks.architectures import VOCABULARY, toy_config
from simpo.models.devices import device
from simpo.models.settings import ModelArguments
from simpo.planning.cards import measure_rates, store_rates
from simpo.planning.search import KINDS, Estimate, Planner
from simpo.planning.settings import PlanSettings


@dataclass(frozen=True)
class Run:
    """A run with predicted and measured memory and time."""

    name: str
    command: str = "train"
    model: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    responses: int = 2
    processes: int = 1
    architecture: str = "llama"


_HYBRIDS = {"LFM2": "lfm2", "Bamba": "bamba", "Mamba-2": "mamba2", "Qwen3-Next": "qwen3_next"}
RUNS = (
    Run("SimPO"),
    Run("SimPO, one micro-batch", config={"max_batch_tokens": 8192}),
    Run("SimPO, checkpointing", config={"gradient_checkpointing": True}),
    Run(
        "SimPO, half checkpointed, SGD",
        config={"gradient_checkpointing": True, "checkpointed_share": 0.5, "optim": "sgd"},
    ),
    Run("SimPO, LoRA", model={"use_peft": True}),
    Run("SimPO, LoRA, checkpointing", model={"use_peft": True}, config={"gradient_checkpointing": True}),
    Run("SimPO, K = 8", config={"max_batch_tokens": 1024}, responses=8),
    Run("SimPO, bf16, Adafactor", config={"bf16": True, "optim": "adafactor"}),
    Run("DPO, cached", config={"objective": "dpo", "beta": 0.1}),
    Run("DPO, live", config={"objective": "dpo", "beta": 0.1, "precompute_ref_log_probs": False}),
    Run("SFT", "sft", responses=1),
    Run("reward model", "reward"),
    Run("SimPO, 2 processes", processes=2),
    *(
        Run(name, architecture=architecture, config={"gradient_checkpointing": checkpointing})
        for title, architecture in _HYBRIDS.items()
        for name, checkpointing in ((title, False), (f"{title}, checkpointing", True))
    ),
)


_LARGE = {"max_batch_tokens": 8192, "bf16": True}
_ROUNDS = 3  # of --times

GPU_RUNS = (
    Run("SimPO", config=_LARGE),
    Run("SimPO, checkpointing", config=_LARGE | {"gradient_checkpointing": True}),
    Run(
        "SimPO, half checkpointed, 8-bit Adam",
        config=_LARGE | {"gradient_checkpointing": True, "checkpointed_share": 0.5, "optim": "adamw_8bit"},
    ),
    Run("SimPO, bf16 weights", model={"dtype": "bfloat16"}, config=_LARGE),
    Run("SimPO, LoRA", model={"use_peft": True, "dtype": "bfloat16"}, config=_LARGE),
    Run("SimPO, QLoRA", model={"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16"}, config=_LARGE),
    Run("DPO, live", config=_LARGE | {"objective": "dpo", "beta": 0.1, "precompute_ref_log_probs": False}),
    Run("SFT", "sft", config=_LARGE, responses=1),
    Run("reward model", "reward", config=_LARGE),
)


def make_model(folder: Path, layers: int = 6, hidden: int = 256, vocabulary: int = 4000) -> None:
    """Save a Llama with random weights."""
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
    """Return random tokenized rows."""
    draw = np.random.default_rng(0)

    def part() -> list[int]:
        return draw.integers(3, vocabulary, draw.integers(longest // 4, longest)).tolist()

    rows = [{"prompt_ids": part(), "response_ids": [part() for _ in range(responses)]} for _ in range(count)]
    if responses > 2:
        rows = [row | {"scores": [float(-k) for k in range(responses)]} for row in rows]
    return Dataset.from_list(rows)


def config_of(run: Run, folder: Path, steps: int = 3) -> Any:
    """Return the run's configuration with 8 rows per step over all processes (16 on a GPU)."""
    keys = {"max_batch_tokens": 512} | dict(run.config)
    return KINDS[run.command].config_type(
        str(folder / "out"),
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=(8 if device().type == "cpu" else 16) // run.processes,
        max_steps=steps,
        disable_tqdm=True,
        logging_strategy="no",
        **keys,
    )


def predicted(run: Run, folder: Path, rows: Dataset) -> Estimate:
    """Return simpo plan's estimate for the run."""
    parts = (ModelArguments(str(folder), **run.model), None, config_of(run, folder))
    sharding = None if run.processes == 1 else "ddp"
    planner = Planner(parts, PlanSettings(run.command, gpus=run.processes, sharding=sharding), rows)  # type: ignore[arg-type]
    return planner.estimate(planner.recipe_choice)


def clock() -> float:
    """Return the time in seconds: CPU time with a single thread, so that other processes do not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class _Times(TrainerCallback):
    """Records the duration of each optimizer step in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if device().type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(clock() - self._start)


def train(run: Run, folder: Path, rows: Dataset, steps: int = 3) -> list[float]:
    """Train and return the duration of each step in seconds."""
    kind, times = KINDS[run.command], _Times()
    model: Any = kind.load(ModelArguments(str(folder), **run.model))
    if device().type == "cpu":  # loaded weights are memory-mapped and bypass the allocator
        model = copy.deepcopy(model)
    kind(model, args=config_of(run, folder, steps), train_dataset=rows, callbacks=[times]).train()
    return times.seconds


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the peak bytes that PyTorch's CPU allocator holds of everything allocated during ``run``."""
    with profile(profile_memory=True) as recorded:
        run()
        gc.collect()  # memory freed outside the profile would stay in the count of the next run
    waiting, peak = list(recorded.kineto_results.experimental_event_tree()), 0
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            peak = max(peak, event.extra_fields.total_allocated)
    return peak


def _peak_of_processes(run: Run, folder: Path) -> int:
    """Train in several processes and return the largest peak among them, in bytes."""
    several = ["-m", "torch.distributed.run", f"--nproc_per_node={run.processes}"]
    worker = ["-m", "benchmarks.plan_accuracy", "--worker", run.name, "--folder", str(folder)]
    output = subprocess.run([sys.executable, *several, *worker], check=True, capture_output=True, text=True).stdout
    return max(json.loads(line)["peak"] for line in output.splitlines() if line.startswith('{"peak"'))


def _compare_memory(run: Run, folder: Path) -> tuple[float, float]:
    """Return the measured and the predicted peak in MiB."""
    rows = make_rows(24, run.responses, **({} if run.architecture == "llama" else {"vocabulary": VOCABULARY}))
    estimate = predicted(run, folder, rows)
    alone = run.processes == 1
    peak = peak_bytes(lambda: train(run, folder, rows)) if alone else _peak_of_processes(run, folder)
    return peak / 2**20, estimate.total / 2**20


def _compare_times(folder: Path) -> None:
    """Print the measured and predicted seconds per step of all Llama runs in one process, as medians over rounds.

    A shared machine's speed changes from minute to minute, so each round calibrates anew. Hybrid models are not
    compared, because without CUDA kernels their layers' times depend on how well PyTorch runs many small operations;
    neither are several processes, because they share the cores.
    """
    runs = [run for run in RUNS if run.processes == 1 and run.architecture == "llama"]
    found: dict[str, list[tuple[float, float]]] = {run.name: [] for run in runs}
    for _ in range(_ROUNDS):
        store_rates(measure_rates(lambda _: None))
        for run in runs:
            rows = make_rows(24, run.responses)
            estimate = predicted(run, folder, rows)
            assert estimate.step_seconds is not None
            found[run.name].append((float(np.median(train(run, folder, rows, 9)[3:])), estimate.step_seconds))
            print(run.name, found[run.name], file=sys.stderr, flush=True)
    for name, pairs in found.items():
        measured, expected = np.median(pairs, axis=0)
        error = np.median([expected / measured - 1 for measured, expected in pairs])
        print(f"| {name} | {measured:.4g} | {expected:.4g} | {error:+.1%} |")


def _compare_on_gpu(run: Run, folder: Path) -> dict[str, Any]:
    """Return measured and predicted peak memory in MiB and median seconds per step."""
    rows = make_rows(16 * 8, run.responses, vocabulary=32000, longest=600)
    estimate = predicted(run, folder, rows)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = float(np.median(train(run, folder, rows, 8)[3:]))
    tensors = estimate.total - estimate.memory["context"] - estimate.memory["fragmentation"]
    peak = torch.cuda.max_memory_allocated() - before
    found = {"peak_mib": peak / 2**20, "predicted_mib": tensors / 2**20, "memory_error": tensors / peak - 1}
    found |= {"step_seconds": seconds, "predicted_seconds": estimate.step_seconds}
    if estimate.step_seconds is not None:
        found["time_error"] = estimate.step_seconds / seconds - 1
    return {"name": run.name} | found


def _main_on_gpu(folder: Path, output: Path | None) -> None:
    make_model(folder, layers=8, hidden=2048, vocabulary=32000)
    found = []
    for run in GPU_RUNS:
        try:
            one = _compare_on_gpu(run, folder)
        except Exception as error:  # continue with the other runs
            one = {"name": run.name, "failed": f"{type(error).__name__}: {error}"}
        found.append(one)
        print("|", " | ".join(str(value) for value in one.values()), "|", flush=True)
        if output:
            output.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Compare all runs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--times", action="store_true", help="calibrate this machine, and compare step times instead of memory"
    )
    parser.add_argument("--output", type=Path, help="GPU only: JSON file for all measurements")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        run = next(run for run in RUNS if run.name == asked.worker)
        rows = make_rows(24, run.responses)
        print(json.dumps({"peak": peak_bytes(lambda: train(run, asked.folder, rows))}))
        return
    folder = Path(tempfile.mkdtemp())
    if device().type == "cuda":
        _main_on_gpu(folder, asked.output)
        return
    make_model(folder / "llama")
    if asked.times:
        _compare_times(folder / "llama")
        return
    for run in RUNS:
        if not (path := folder / run.architecture).exists():
            AutoModelForCausalLM.from_config(toy_config(run.architecture)).save_pretrained(path)
        measured, expected = _compare_memory(run, path)
        print(f"| {run.name} | {measured:.4g} | {expected:.4g} | {expected / measured - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
