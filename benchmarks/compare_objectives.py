"""Compare all objectives and loss modifiers on the same pairs and model, each tuned, over several seeds, in one table.

A row is an objective with its defaults, or with one key that modifies its loss. The first seed chooses the learning
rate by accuracy on the last pairs in the training file, which are neither trained on nor reported. The other seeds then
train at that rate. Measurements are stored, so the same command continues an interrupted run. Run from the repository
root::

    python -m benchmarks.compare_objectives --model MODEL --train TRAIN.jsonl.gz --test TEST.jsonl.gz --output_dir DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch

from benchmarks.objective_runs import Bench, Keys, Measured
from simpo.data.rows import rows_of
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError
from simpo.models.loading import load_tokenizer
from simpo.objectives import OBJECTIVES
from simpo.runs.files import write_text
from simpo.statistics import Interval, bootstrap_interval

# Keys that modify a loss, with the objectives they make sense for.
MODIFIED: tuple[Keys, ...] = (
    {"objective": "simpo", "label_smoothing": 0.1},
    {"objective": "simpo", "sft_weight": 0.5},
    {"objective": "simpo", "wpo_weights": True},
    {"objective": "dpo", "label_smoothing": 0.1},
    {"objective": "dpo", "kl_weight": 1.0},
    {"objective": "dpo", "wpo_weights": True},
    {"objective": "dpo", "ld_alpha": 0.5},
    {"objective": "ipo", "length_normalized": True},
    {"objective": "f_dpo", "divergence": "forward_kl"},
    {"objective": {"dpo": 0.8, "bco": 0.2}},
)
HEADS = ("objective", "learning rate", "accuracy", "seeds", "apart [95%]", "more apart than {} [95%, all]")
HEADS += ("chosen", "rejected", "KL", "step time")


@dataclass(frozen=True)
class Tuned:
    """A row of the table: its best learning rate, the runs at that rate (one per seed), and the runs that failed."""

    rate: str
    runs: list[Measured]
    failures: list[str]


def main() -> int:
    """Run the comparison and return the exit code."""
    options = _options()
    try:
        return _compare(options)
    except SimpoError as error:
        print(f"compare_objectives: {error}", file=sys.stderr)
        return 2


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_objectives", description="Compare all objectives side by side.")
    parser.add_argument("--model", required=True, help="folder of the initial model")
    parser.add_argument("--train", required=True, help="training pairs")
    parser.add_argument("--test", required=True, help="held-out pairs")
    parser.add_argument(
        "--output_dir", required=True, type=Path, help="folder for measurements, new or to be continued"
    )
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="with their modifiers (default: all)")
    parser.add_argument("--learning_rates", nargs="+", default=["3e-5", "1e-4", "3e-4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="the first chooses the learning rate")
    parser.add_argument("--rows", type=int, default=128, help="train on the first N pairs that fit")
    parser.add_argument("--tuning", type=int, default=128, help="tune on the last N pairs that fit")
    parser.add_argument("--held_out", type=int, default=128, help="report the first N held-out pairs that fit")
    parser.add_argument("--max_length", type=int, default=384, help="prompt and response together, in tokens")
    parser.add_argument("--pairs_per_step", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch CPU threads")
    return parser.parse_args()


def _compare(options: argparse.Namespace) -> int:
    rows = table_rows(options.objectives)
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    texts = {
        "train": pairs_that_fit(options.train, options.rows, options.model, options.max_length),
        "tuning": pairs_that_fit(options.train, options.tuning, options.model, options.max_length, last=True),
        "test": pairs_that_fit(options.test, options.held_out, options.model, options.max_length),
    }
    if set(texts["train"]) & {*texts["tuning"], *texts["test"]}:
        raise SimpoError(f"--rows, --tuning: {options.train} has too few pairs or shares pairs with {options.test}")
    shared: Keys = {
        "max_length": options.max_length,
        "per_device_train_batch_size": options.pairs_per_step,
        "num_train_epochs": options.epochs,
    }
    _check_same(options.output_dir, {"model": options.model, **texts, **shared})
    bench = Bench(options.model, options.output_dir, texts, shared)
    table = {label: tune(label, keys, options.learning_rates, options.seeds, bench) for label, keys in rows.items()}
    print("\n".join(report(table, bench.clusters)))
    average, total, longer = bench.held_out.start_preferences()[-len(bench.clusters) :].mean(axis=0)
    print(
        f"initial model: the chosen response has the higher average log-probability in {average:.3f} of these pairs, "
        f"the higher total in {total:.3f}, and more tokens in {longer:.3f}"
    )
    return 0


def table_rows(objectives: Sequence[str]) -> dict[str, Keys]:
    """Return the recipe keys of every row by label: the objectives and their modified variants.

    Raises:
        SimpoError: for an unknown objective.
    """
    if unknown := [name for name in objectives if name not in OBJECTIVES]:
        raise SimpoError(f"--objectives: unknown: {', '.join(unknown)}; choose from {', '.join(OBJECTIVES)}")
    keys: list[Keys] = [{"objective": name} for name in objectives]
    keys += [given for given in MODIFIED if set(_parts(given)) <= set(objectives)]
    return {_label(given): given for given in keys}


def _parts(keys: Keys) -> list[str]:
    return list(keys["objective"]) if isinstance(keys["objective"], dict) else [keys["objective"]]


def _label(keys: Keys) -> str:
    objective = keys["objective"]
    mixed = isinstance(objective, dict)
    name = " + ".join(f"{weight:g} {part}" for part, weight in objective.items()) if mixed else objective
    return ", ".join([name, *(f"{key} {value}".lower() for key, value in keys.items() if key != "objective")])


def pairs_that_fit(source: str, count: int, model: str, max_length: int, *, last: bool = False) -> list[str]:
    """Return the lines of the first (or last) ``count`` pairs in ``source`` that fit into ``max_length`` untruncated.

    Raises:
        SimpoError: if too few pairs fit.
    """
    rows = load_rows(source, split="train")
    settings = TokenizeSettings(max_length=max_length, truncation="drop")
    found = prepare(rows, load_tokenizer(model), settings, label="pairs").dataset["where"]
    kept = set(found[-count:] if last else found[:count])
    if len(kept) < count:
        raise SimpoError(f"{source}: only {len(kept)} pairs fit into max_length {max_length}; {count} are needed")
    return [json.dumps(row) + "\n" for row, where in rows_of(rows[:], range(len(rows)), source) if where in kept]


def _check_same(folder: Path, setting: Keys) -> None:
    """Reject a folder with measurements from different settings; record the settings in a new one."""
    path = folder / "setting.json"
    if not path.exists():
        write_text(path, json.dumps(setting))
    before = json.loads(path.read_text())
    if changed := [key for key in setting if setting[key] != before[key]]:
        raise SimpoError(
            f"--output_dir: {folder} has measurements with different settings ({', '.join(changed)}); choose another"
        )


def tune(label: str, keys: Keys, rates: Sequence[str], seeds: Sequence[int], bench: Bench) -> Tuned:
    """Choose a row's learning rate with the first seed, then train it at that rate with the other seeds."""
    tried = {rate: bench.run(label, keys, rate, seeds[0]) for rate in rates}
    found = {rate: run for rate, run in tried.items() if isinstance(run, Measured)}
    best = max(found, key=lambda rate: bench.preference(found[rate]), default="")
    if found:
        tried |= {f"{best}, seed {seed}": bench.run(label, keys, best, seed) for seed in seeds[1:]}
    failures = [f"{label} at {where} failed: {run}" for where, run in tried.items() if isinstance(run, str)]
    others = [run for where, run in tried.items() if where not in rates and isinstance(run, Measured)]
    return Tuned(best, [found[best], *others] if found else [], failures)


def report(table: Mapping[str, Tuned], clusters: np.ndarray) -> Iterator[str]:
    """Yield the table in Markdown, line by line.

    Args:
        table: the rows; differences are relative to the row ``dpo`` if there is one, otherwise to the first row.
        clusters: ``[pairs]`` index of the prompt of each reported pair.
    """
    finished = {label: row for label, row in table.items() if row.runs}
    base = "dpo" if "dpo" in finished else next(iter(finished), "")
    yield f"| {' | '.join(HEADS).format(f'`{base}`')} |"
    yield f"|---|{'---:|' * (len(HEADS) - 1)}"
    for label, row in finished.items():
        yield f"| {' | '.join(_cells(label, row, finished[base], clusters, family=max(1, len(finished) - 1)))} |"
    yield ""
    yield from (failure for row in table.values() for failure in row.failures)


def _cells(label: str, row: Tuned, base: Tuned, clusters: np.ndarray, family: int) -> Iterator[str]:
    count = len(clusters)
    accuracies = [statistics.fmean(run.correct[-count:]) for run in row.runs]
    apart = by_pair(row, "apart", count)
    difference = apart - by_pair(base, "apart", count)
    step, base_step = (statistics.median(run.step_seconds for run in which.runs) for which in (row, base))
    yield f"`{label}`"
    yield row.rate
    yield f"{statistics.fmean(accuracies):.3f}"
    yield f"{min(accuracies):.3f} to {max(accuracies):.3f}"
    yield _format(clustered_mean(apart, clusters), ".3f")
    yield "" if row is base else _format(clustered_mean(difference, clusters, family), "+.3f")
    yield f"{by_pair(row, 'chosen', count).mean():+.4f}"
    yield f"{by_pair(row, 'rejected', count).mean():+.4f}"
    yield f"{by_pair(row, 'kl', count).mean():.2g}"
    yield f"{step / base_step:.2f}"


def by_pair(row: Tuned, name: str, count: int) -> np.ndarray:
    """Average the attribute ``name`` of :class:`Measured` over seeds, for the reported pairs: ``[count]``."""
    return np.mean([getattr(run, name)[-count:] for run in row.runs], axis=0)


def clustered_mean(values: np.ndarray, clusters: np.ndarray, family: int = 1) -> Interval:
    """Return the mean of ``values`` ``[pairs]`` with a bootstrap interval that resamples whole clusters."""
    sums = np.stack([np.bincount(clusters, values), np.bincount(clusters)], axis=1)
    return bootstrap_interval(sums, lambda drawn: drawn[..., 0] / drawn[..., 1], seed=0, family=family)


def _format(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


if __name__ == "__main__":
    sys.exit(main())
