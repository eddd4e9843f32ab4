"""Measure speed, memory and a profile of simpo's variants, one after the other on one model in one process.

For each variant, complete optimizer steps are timed and one more runs under PyTorch's profiler, which lists operators
(kernels on a GPU). Run from the repository root::

    python -m benchmarks.profile_step --variants 2048
    python -m benchmarks.profile_step --device cuda --model 8b --weights bf16 --dtype bf16 --variants 4096 4096,compiled
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from benchmarks.arithmetic import Product, Shape, necessary_flops
from benchmarks.entrants import Entrant, add_training_options
from benchmarks.memory import in_use_mib, peak_mib
from benchmarks.products import seconds_of
from benchmarks.profiles import PROFILES, synthetic_rows
from benchmarks.report import processor, versions
from benchmarks.rows import word_tokenizer
from benchmarks.setting import Setting, build_model, load_comparisons, prepare
from benchmarks.simpo_entrants import simpo_trainer

# substrings that identify matrix products, including attention, in CPU operator and GPU kernel names
PRODUCTS = ("mm", "scaled_dot_product", "gemm", "nvjet", "cutlass", "flash", "xmma")


class Recorder(TrainerCallback):
    """Records when each step ended, and profiles the last one."""

    def __init__(self, device: str) -> None:
        kind = torch.profiler.ProfilerActivity
        self.device = device
        self.profiler = torch.profiler.profile(activities=[kind.CUDA if device == "cuda" else kind.CPU])
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the end of a step; start the profiler before the last one and stop it afterwards."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if state.global_step == state.max_steps - 1:
            self.profiler.start()
        elif state.global_step == state.max_steps:
            self.profiler.stop()

    @property
    def seconds(self) -> float:
        """Mean seconds per step, excluding the warm-up step and the profiled step."""
        return (self.ends[-2] - self.ends[0]) / (len(self.ends) - 2)


def main() -> int:
    """Profile every variant and return the exit code."""
    parser = argparse.ArgumentParser(prog="profile_step", description="Show where simpo's step time goes.")
    add_training_options(parser)
    parser.add_argument("--steps", type=int, default=2, help="steps measured, between a warm-up and a profiled step")
    parser.add_argument("--rows", type=int, default=15, help="number of operators shown")
    parser.add_argument("--output", type=Path, help="JSON file for the measurements")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        chosen = ("pairs_per_step", "model", "dtype", "weights", "optimizer", "device", "threads")
        given = {name: getattr(options, name) for name in chosen}
        setting = Setting(folder, pairs=options.pairs_per_step * (options.steps + 1), **given)
        words = setting.vocabulary - 1
        rows = synthetic_rows(PROFILES[options.profile], setting.steps * setting.pairs_per_step, 2, words)
        counts = prepare(setting, rows, word_tokenizer(words))
        model = build_model(setting)
        report = {
            "setting": {name: value for name, value in asdict(setting).items() if name != "folder"},
            "data": counts,
            "processor": processor(setting.device),
            "versions": versions(),
            "peak_gflops": _product_rate(setting) / 1e9,
            "variants": [],
        }
        for entrant in options.variants:
            found, table = _measure(model, entrant, setting, folder, report["peak_gflops"] * 1e9, options.rows)
            report["variants"].append(found)
            Console(width=150).print(table)
            if options.output:  # after every variant, so that an interrupted run keeps its results
                options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _product_rate(setting: Setting) -> float:
    """Return the FLOP/s of a large matrix product."""
    square = Product(8192, 8192, 8192) if setting.device == "cuda" else Product(1024, 1024, 1024)
    dtype = torch.bfloat16 if "bf16" in (setting.dtype, setting.weights) else torch.float32
    return square.flops / seconds_of([square], dtype, setting.device)


def _measure(
    model: Any, entrant: Entrant, setting: Setting, folder: str, rate: float, rows: int
) -> tuple[dict[str, Any], Table]:
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model.gradient_checkpointing_disable()
    before = in_use_mib(setting.device)
    recorder = Recorder(setting.device)
    try:
        trainer = simpo_trainer(model, entrant, setting, folder)
        trainer.add_callback(recorder)
        trainer.train()
    except Exception as error:  # typically out of memory; the next variant may still fit
        model.zero_grad()
        reason = f"{type(error).__name__}: {error}"
        return {"name": entrant.name, "failed": reason}, Table(title=f"{entrant.name}: {reason[:140]}")
    step = setting.pairs_per_step
    measured = load_comparisons(setting)[step:-step]
    tokens, flops = sum(row.packed_length for row in measured), necessary_flops(measured, Shape.of(model.config))
    steps = setting.steps - 2
    found = {
        "name": entrant.name,
        "seconds_per_step": recorder.seconds,
        "tokens_per_second": tokens / steps / recorder.seconds,
        "utilisation": flops / steps / recorder.seconds / rate,
        "peak_mib": peak_mib(setting.device),
        "in_use_before_mib": before,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    return found, _table(found, recorder, rows)


def _table(found: dict[str, Any], recorder: Recorder, rows: int) -> Table:
    def own(event: Any) -> float:
        return event.self_device_time_total if recorder.device == "cuda" else event.self_cpu_time_total

    events = sorted(recorder.profiler.key_averages(), key=own, reverse=True)
    total = sum(map(own, events))  # microseconds
    products = sum(own(event) for event in events if any(name in event.key for name in PRODUCTS))
    profiled = recorder.ends[-1] - recorder.ends[-2]
    table = Table(
        title=f"{found['name']}: {found['seconds_per_step']:.3f} s/step, {found['tokens_per_second']:.0f} tokens/s, "
        f"MFU {found['utilisation']:.1%}, peak {found['peak_mib']:.0f} MiB\n"
        f"profiled step: {profiled:.3f} s, {total / 1e6:.3f} s in operators, {products / total:.0%} in matrix products"
    )
    for column in ("operator", "calls", "ms", "share"):
        table.add_column(column, justify="left" if column == "operator" else "right", no_wrap=True)
    for event in events[:rows]:
        table.add_row(event.key[:105], str(event.count), f"{own(event) / 1e3:.1f}", f"{own(event) / total:.1%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
