"""Where an optimizer step of simpo spends its time, operator by operator, or on a GPU kernel by kernel.

Run from the repository's root::

    python -m benchmarks.profile_step --variant 2048
    python -m benchmarks.profile_step --device cuda --model 8b --weights bf16 --dtype bf16 --variant 4096
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from benchmarks.entrants import variant
from benchmarks.own import simpo_trainer
from benchmarks.profiles import PROFILES, made_up_rows
from benchmarks.rows import word_tokenizer
from benchmarks.setting import MODELS, Setting, build_model, prepare

# in the names of operators of a CPU and of kernels of a GPU that compute matrix products, attention's included
PRODUCTS = ("mm", "scaled_dot_product", "gemm", "nvjet", "cutlass", "flash", "xmma")


class Recorder(TrainerCallback):
    """Profiles every step but the first."""

    def __init__(self, device: str) -> None:
        kind = torch.profiler.ProfilerActivity
        self.device = device
        self.profiler = torch.profiler.profile(activities=[kind.CUDA if device == "cuda" else kind.CPU])
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start after the warm-up, stop after the last step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        if state.global_step == 1:
            self.profiler.start()
            self.seconds = -time.perf_counter()
        elif state.global_step == state.max_steps:
            self.seconds += time.perf_counter()
            self.profiler.stop()


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="profile_step", description="Operators or kernels by the time they take.")
    parser.add_argument("--profile", choices=PROFILES, default="hh", help="lengths of the made-up pairs")
    parser.add_argument("--pairs", type=int, default=32, help="pairs profiled")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--model", choices=MODELS, default="small", help="size of the Llama model")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32", help="type of the weights")
    parser.add_argument("--optimizer", default="adamw_torch_fused", help="transformers' optim")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", type=variant, default=variant("default"), help="simpo's settings, as in compare")
    parser.add_argument("--rows", type=int, default=25, help="operators shown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        chosen = ("pairs", "pairs_per_step", "model", "dtype", "weights", "optimizer", "device", "threads")
        setting = Setting(folder, **{name: getattr(options, name) for name in chosen})
        words = setting.vocabulary - 1
        rows = made_up_rows(PROFILES[options.profile], setting.steps * setting.pairs_per_step, 2, words)
        prepare(setting, rows, word_tokenizer(words))
        trainer = simpo_trainer(build_model(setting), options.variant, setting, folder)
        recorder = Recorder(options.device)
        trainer.add_callback(recorder)
        trainer.train()
    Console(width=150).print(_table(recorder, setting.steps - 1, options.rows))
    return 0


def _table(recorder: Recorder, steps: int, rows: int) -> Table:
    def own(event: Any) -> float:
        return event.self_device_time_total if recorder.device == "cuda" else event.self_cpu_time_total

    events = sorted(recorder.profiler.key_averages(), key=own, reverse=True)
    total = sum(map(own, events))  # microseconds
    products = sum(own(event) for event in events if any(name in event.key for name in PRODUCTS))
    table = Table(
        title=f"{recorder.seconds / steps:.2f} s a step, {total / 1e6 / recorder.seconds:.0%} of it busy, "
        f"{products / total:.0%} of that in matrix products"
    )
    for column in ("operator", "calls a step", "ms a step", "share"):
        table.add_column(column, justify="left" if column == "operator" else "right", no_wrap=True)
    for event in events[:rows]:
        table.add_row(
            event.key[:100],
            f"{event.count / steps:.0f}",
            f"{own(event) / 1e3 / steps:.1f}",
            f"{own(event) / total:.1%}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
