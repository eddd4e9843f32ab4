"""All objectives on the same pairs from the same model with the same budget, the best of a few learning rates each.

A learning rate is chosen by accuracy on pairs of its own: the last ones of the training file, none of which is trained
on or reported. Every run is a run folder of ``simpo train`` with a process of its own, one after the other. What has
been measured is kept, so that the same command continues. Run from the repository's root::

    python -m benchmarks.compare_objectives --model MODEL --train TRAIN.jsonl.gz --test TEST.jsonl.gz --output_dir DIR
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets

from benchmarks.objective_runs import FILE_NAME, Measured
from simpo.data.rows import rows_of
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError
from simpo.models.loading import load_tokenizer
from simpo.objectives import OBJECTIVES
from simpo.runs.atomic import write_text

ROOT = Path(__file__).parents[1]
_CANDIDATES = 8  # pairs that are read for every pair that is needed
_MISTAKE = "simpo.errors.SimpoError: "
HEADS = (
    *("objective", "learning rate", "accuracy [95%]", "margin", "chosen", "rejected", "KL", "step time", "peak MiB"),
)

Runs = dict[tuple[str, str], Measured | str]


@dataclass(frozen=True)
class Budget:
    """What all runs have in common."""

    model: str
    train: Path
    test: Path
    tuning: int
    folder: Path
    max_length: int
    pairs_per_step: int
    epochs: float
    seed: int
    threads: int

    def arguments(self, objective: str, rate: str) -> list[str]:
        """The command line of ``simpo train``."""
        given = {
            "model_name_or_path": self.model,
            "dataset_name": self.train,
            "eval_dataset_name": self.test,
            "output_dir": self.run_folder(objective, rate),
            "objective": objective,
            "learning_rate": rate,
            "max_length": self.max_length,
            "per_device_train_batch_size": self.pairs_per_step,
            "per_device_eval_batch_size": self.pairs_per_step,
            "num_train_epochs": self.epochs,
            "seed": self.seed,
            "save_strategy": "no",
            "report_to": "none",
        }
        return [f"--{key}={value}" for key, value in given.items()]

    def run_folder(self, objective: str, rate: str) -> Path:
        """Where it trains."""
        return self.folder / f"{objective}-{rate}"


def main() -> int:
    """Entry point; returns the exit code."""
    options = _options()
    unknown = [name for name in options.objectives if name not in OBJECTIVES]
    if unknown:
        print(f"compare_objectives: --objectives: there is no {', '.join(unknown)}", file=sys.stderr)
        return 2
    datasets.disable_progress_bars()
    rows = {
        "train": fitting(options.train, options.rows, options.model, options.max_length),
        "test": [
            *fitting(options.train, options.tuning, options.model, options.max_length, last=True),
            *fitting(options.test, options.held_out, options.model, options.max_length),
        ],
    }
    if set(rows["train"]) & set(rows["test"]):
        print(f"compare_objectives: --tuning: {options.train} has too few pairs for it", file=sys.stderr)
        return 2
    data = {name: options.output_dir / f"{name}.jsonl" for name in rows}
    for name, lines in rows.items():
        write_text(data[name], "".join(lines))
    budget = Budget(
        options.model,
        data["train"],
        data["test"],
        options.tuning,
        options.output_dir,
        options.max_length,
        options.pairs_per_step,
        options.epochs,
        options.seed,
        options.threads,
    )
    runs: Runs = {}
    for objective in options.objectives:
        for rate in options.learning_rates:
            print(f"{objective} at {rate}", file=sys.stderr, flush=True)
            runs[objective, rate] = _run(budget, objective, rate)
    print("\n".join(report(runs, options.rows)))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_objectives", description="All objectives, side by side.")
    parser.add_argument("--model", required=True, help="folder of the start model")
    parser.add_argument("--train", required=True, help="training pairs")
    parser.add_argument("--test", required=True, help="held-out pairs")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the runs; the same one continues")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="rows of the table (default: all)")
    parser.add_argument("--learning_rates", nargs="+", default=["3e-5", "1e-4", "3e-4"])
    parser.add_argument("--rows", type=int, default=128, help="the first training pairs that fit")
    parser.add_argument("--tuning", type=int, default=128, help="the last training pairs that fit choose the rate")
    parser.add_argument("--held_out", type=int, default=128, help="the first held-out pairs that fit are reported")
    parser.add_argument("--max_length", type=int, default=384, help="of prompt and response, in tokens")
    parser.add_argument("--pairs_per_step", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch's pool, on a CPU")
    return parser.parse_args()


def fitting(source: str, count: int, model: str, max_length: int, *, last: bool = False) -> list[str]:
    """Lines of the first ``count`` pairs of ``source``, or the last ones, that fit into ``max_length`` uncut.

    Raises:
        SimpoError: too few pairs fit.
    """
    rows = load_rows(source, split="train")
    candidates = min(len(rows), _CANDIDATES * count)
    rows = rows.select(range(len(rows) - candidates, len(rows)) if last else range(candidates))
    settings = TokenizeSettings(max_length=max_length, truncation="drop")
    found = prepare(rows, load_tokenizer(model), settings, label="pairs").dataset["where"]
    kept = set(found[-count:] if last else found[:count])
    if len(kept) < count:
        raise SimpoError(f"{source}: {len(kept)} of the candidate pairs fit into max_length {max_length}, not {count}")
    return [json.dumps(row) + "\n" for row, where in rows_of(rows[:], range(len(rows)), source) if where in kept]


def _run(budget: Budget, objective: str, rate: str) -> Measured | str:
    """The measurement, made now or before; or why there is none."""
    path = budget.run_folder(objective, rate) / FILE_NAME
    if not path.exists():
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.objective_runs"),
                *(json.dumps(budget.arguments(objective, rate)), str(budget.tuning)),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(budget.threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1].removeprefix(_MISTAKE)
    return Measured(**json.loads(path.read_text()))


def report(runs: Mapping[tuple[str, str], Measured | str], rows: int) -> Iterator[str]:
    """The table in Markdown: every objective at its best learning rate, and those that failed."""
    finished: dict[str, dict[str, Measured]] = {}
    for (objective, rate), found in runs.items():
        if isinstance(found, Measured):
            finished.setdefault(objective, {})[rate] = found
    yield f"| {' | '.join(HEADS)} |"
    yield f"|---|{'---:|' * (len(HEADS) - 1)}"
    times = {name: statistics.median(m.step_seconds for m in found.values()) for name, found in finished.items()}
    for objective, found in finished.items():
        rate = max(found, key=lambda rate: (found[rate].tuning, -found[rate].kl))
        yield _row(objective, rate, found[rate], times[objective] / next(iter(times.values())))
    yield ""
    yield (
        f"{rows} training pairs. Learning rates tried: {', '.join(dict.fromkeys(rate for _, rate in runs))}; the best "
        "by accuracy on the tuning pairs is shown (of equals the one that moved less). "
        "Margin: mean difference of the implicit rewards, on each objective's own scale. Chosen, rejected: change of "
        "the average log-probability a token. KL: of the trained model to the start, exact over the vocabulary, mean "
        "over the held-out responses' tokens. All in nats. Step time: in that of the first row, over all its rates."
    )
    for (objective, rate), found in runs.items():
        if isinstance(found, str):
            yield f"\n{objective} at {rate} failed: {found}"


def _row(objective: str, rate: str, found: Measured, step_time: float) -> str:
    cells = (
        f"`{objective}`",
        rate,
        f"{found.accuracy:.3f} [{found.low:.3f}, {found.high:.3f}]",
        f"{found.margin:.3g}",
        f"{found.chosen:+.4f}",
        f"{found.rejected:+.4f}",
        f"{found.kl:.2g}",
        f"{step_time:.2f}",
        f"{found.peak_mib:.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
