"""All objectives and modifiers on the same pairs from the same model, each tuned, from several seeds, as one table.

A row is an objective with its own defaults, or with one key that modifies its loss. Its learning rate is chosen with
the first seed, by accuracy on pairs of its own: the last ones of the training file, none of which is trained on or
reported. Then it is trained from the other seeds at that rate. What has been measured is kept, so that the same command
continues. Run from the repository's root::

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

# What modifies a loss, each with objectives that it makes sense for.
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
    """A row of the table: its best learning rate and what was measured there, one run a seed; or why nothing was."""

    rate: str
    runs: list[Measured]
    failures: list[str]


def main() -> int:
    """Entry point; returns the exit code."""
    options = _options()
    try:
        return _compare(options)
    except SimpoError as error:
        print(f"compare_objectives: {error}", file=sys.stderr)
        return 2


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_objectives", description="All objectives, side by side.")
    parser.add_argument("--model", required=True, help="folder of the start model")
    parser.add_argument("--train", required=True, help="training pairs")
    parser.add_argument("--test", required=True, help="held-out pairs")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of what is measured; it is continued")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="with their modifiers (default: all)")
    parser.add_argument("--learning_rates", nargs="+", default=["3e-5", "1e-4", "3e-4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="the first one chooses the rate")
    parser.add_argument("--rows", type=int, default=128, help="the first training pairs that fit")
    parser.add_argument("--tuning", type=int, default=128, help="the last training pairs that fit choose the rate")
    parser.add_argument("--held_out", type=int, default=128, help="the first held-out pairs that fit are reported")
    parser.add_argument("--max_length", type=int, default=384, help="of prompt and response, in tokens")
    parser.add_argument("--pairs_per_step", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch's pool, on a CPU")
    return parser.parse_args()


def _compare(options: argparse.Namespace) -> int:
    rows = rows_of_the_table(options.objectives)
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    texts = {
        "train": fitting(options.train, options.rows, options.model, options.max_length),
        "tuning": fitting(options.train, options.tuning, options.model, options.max_length, last=True),
        "test": fitting(options.test, options.held_out, options.model, options.max_length),
    }
    if set(texts["train"]) & {*texts["tuning"], *texts["test"]}:
        raise SimpoError(f"--rows, --tuning: {options.train} has too few pairs, or shares some with {options.test}")
    shared: Keys = {
        "max_length": options.max_length,
        "per_device_train_batch_size": options.pairs_per_step,
        "num_train_epochs": options.epochs,
    }
    _check_same(options.output_dir, {"model": options.model, **texts, **shared})
    bench = Bench(options.model, options.output_dir, texts, shared)
    table = {label: tuned(label, keys, options.learning_rates, options.seeds, bench) for label, keys in rows.items()}
    print("\n".join(report(table, bench.clusters)))
    average, total, longer = bench.held_out.start_preferences()[-len(bench.clusters) :].mean(axis=0)
    print(
        f"start model: the chosen response has the higher average log-probability in {average:.3f} of these pairs, the "
        f"higher sum in {total:.3f}; it has more tokens in {longer:.3f}"
    )
    return 0


def rows_of_the_table(objectives: Sequence[str]) -> dict[str, Keys]:
    """Recipe keys of every row by its label: the objectives, and what modifies them.

    Raises:
        SimpoError: an objective is unknown.
    """
    if unknown := [name for name in objectives if name not in OBJECTIVES]:
        raise SimpoError(f"--objectives: there is no {', '.join(unknown)}")
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


def fitting(source: str, count: int, model: str, max_length: int, *, last: bool = False) -> list[str]:
    """Lines of the first ``count`` pairs of ``source``, or the last ones, that fit into ``max_length`` uncut.

    Raises:
        SimpoError: too few pairs fit.
    """
    rows = load_rows(source, split="train")
    settings = TokenizeSettings(max_length=max_length, truncation="drop")
    found = prepare(rows, load_tokenizer(model), settings, label="pairs").dataset["where"]
    kept = set(found[-count:] if last else found[:count])
    if len(kept) < count:
        raise SimpoError(f"{source}: {len(kept)} pairs fit into max_length {max_length}, not {count}")
    return [json.dumps(row) + "\n" for row, where in rows_of(rows[:], range(len(rows)), source) if where in kept]


def _check_same(folder: Path, setting: Keys) -> None:
    """Reject a folder of measurements that were made in another setting; note the setting in a new one."""
    path = folder / "setting.json"
    if not path.exists():
        write_text(path, json.dumps(setting))
    before = json.loads(path.read_text())
    if changed := [key for key in setting if setting[key] != before[key]]:
        raise SimpoError(
            f"--output_dir: {folder} has measurements of another setting ({', '.join(changed)}); name another"
        )


def tuned(label: str, keys: Keys, rates: Sequence[str], seeds: Sequence[int], bench: Bench) -> Tuned:
    """A row at its best learning rate, which the first seed chooses; then it is trained from the other seeds."""
    tried = {rate: bench.run(label, keys, rate, seeds[0]) for rate in rates}
    found = {rate: run for rate, run in tried.items() if isinstance(run, Measured)}
    best = max(found, key=lambda rate: bench.preference(found[rate]), default="")
    if found:
        tried |= {f"{best}, seed {seed}": bench.run(label, keys, best, seed) for seed in seeds[1:]}
    failures = [f"{label} at {where} failed: {run}" for where, run in tried.items() if isinstance(run, str)]
    others = [run for where, run in tried.items() if where not in rates and isinstance(run, Measured)]
    return Tuned(best, [found[best], *others] if found else [], failures)


def report(table: Mapping[str, Tuned], clusters: np.ndarray) -> Iterator[str]:
    """The table in Markdown.

    Args:
        table: the rows; differences are those to the row ``dpo``, or to the first one.
        clusters: ``[pairs]``, the number of the prompt of every pair that is reported.
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
    yield _shown(clustered_mean(apart, clusters), ".3f")
    yield "" if row is base else _shown(clustered_mean(difference, clusters, family), "+.3f")
    yield f"{by_pair(row, 'chosen', count).mean():+.4f}"
    yield f"{by_pair(row, 'rejected', count).mean():+.4f}"
    yield f"{by_pair(row, 'kl', count).mean():.2g}"
    yield f"{step / base_step:.2f}"


def by_pair(row: Tuned, name: str, count: int) -> np.ndarray:
    """``[count]`` means over the seeds of the attribute ``name`` of :class:`Measured`, for the pairs reported."""
    return np.mean([getattr(run, name)[-count:] for run in row.runs], axis=0)


def clustered_mean(values: np.ndarray, clusters: np.ndarray, family: int = 1) -> Interval:
    """The mean of ``values`` ``[pairs]`` with its bootstrap interval; the pairs of a cluster are drawn together."""
    sums = np.stack([np.bincount(clusters, values), np.bincount(clusters)], axis=1)
    return bootstrap_interval(sums, lambda drawn: drawn[..., 0] / drawn[..., 1], seed=0, family=family)


def _shown(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


if __name__ == "__main__":
    sys.exit(main())
