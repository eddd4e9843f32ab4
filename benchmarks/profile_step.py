"""Where an optimizer step of simpo spends its time, operator by operator.

Run from the repository's root::

    python -m benchmarks.profile_step --max-batch-tokens 2048
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from benchmarks.entrants import Entrant
from benchmarks.own import simpo_trainer
from benchmarks.rows import DEFAULT_DATA, byte_pair_tokenizer, read_pairs
from benchmarks.setting import Setting, build_model, prepare

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Recorder(TrainerCallback):
    """Profiles every step but the first."""

    def __init__(self) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start after the warm-up, stop after the last step."""
        if state.global_step == 1:
            self.profiler.start()
        elif state.global_step == state.max_steps:
            self.profiler.stop()


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="profile_step", description="Operators by their own time on the CPU.")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="HH-style transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--pairs", type=int, default=32, help="pairs profiled")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-batch-tokens", type=int, help="simpo's own default otherwise")
    parser.add_argument("--rows", type=int, default=25, help="operators shown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(folder, pairs=options.pairs, dtype=options.dtype, threads=options.threads)
        rows = read_pairs(options.data)
        prepare(setting, rows, byte_pair_tokenizer(rows, setting.vocabulary))
        entrant = Entrant("simpo", "simpo", path="auto", max_batch_tokens=options.max_batch_tokens)
        trainer = simpo_trainer(build_model(setting), entrant, setting, folder)
        recorder = Recorder()
        trainer.add_callback(recorder)
        trainer.train()
    Console(width=110).print(_table(recorder.profiler.key_averages(), setting.steps - 1, options.rows))
    return 0


def _table(averages: Any, steps: int, rows: int) -> Table:
    events = sorted(averages, key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    products = sum(event.self_cpu_time_total for event in events if _is_product(event.key))
    table = Table(title=f"{total / 1e6 / steps:.2f} s a step, {products / total:.0%} of it in matrix products")
    for column in ("operator", "calls a step", "ms a step", "share"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for event in events[:rows]:
        own = event.self_cpu_time_total
        table.add_row(event.key, f"{event.count / steps:.0f}", f"{own / 1e3 / steps:.1f}", f"{own / total:.1%}")
    return table


def _is_product(key: str) -> bool:
    name = key.removeprefix("aten::")
    return name in PRODUCTS or name.startswith("_scaled_dot_product")


if __name__ == "__main__":
    sys.exit(main())
