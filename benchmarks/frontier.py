"""Online training on the tiny world: reward versus KL from the initial model, and how often to resample answers.

    simpo demo --output_dir runs/demo-1
    python -m benchmarks.frontier runs/demo-1 --output_dir runs/frontier
    python -m benchmarks.frontier runs/demo-1 --output_dir runs/frontier --compare freshness

``methods`` trains with PPO, RLOO, GRPO, DPO and SimPO, online and offline, with several KL coefficients (or betas) and
seeds, against the exact judge and against a reward model trained on little data, and compares them with best-of-N.
``freshness`` trains SimPO on the same number of answers, sampled at every step, every 8 steps, every 32 steps, or once.
Every stage is a run of a command and every measurement is stored, so the same command continues after a kill.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from benchmarks.best_of_n import best_of_n_kl
from benchmarks.measurement_cache import MeasurementCache, format_interval
from benchmarks.on_policy import (
    JUDGES,
    Workspace,
    best_of_n_curves,
    divergence,
    plot_against_kl,
    powers_of_two,
    sample,
    simpo,
    train_reward,
)
from simpo.analysis.plots import COLORS
from simpo.runs.files import read_lines, write_lines
from simpo.statistics import Interval, mean_interval

_ANSWERS, _HELD_OUT = 4, 100  # answers per prompt, number of held-out prompts
_COMMON: dict[str, Any] = {
    "num_generations": _ANSWERS, "max_new_tokens": 48, "max_length": 128, "generation_batch_size": 256,
    "save_strategy": "no", "report_to": "none", "logging_steps": 16,
}  # fmt: skip
_METHOD_DEFAULTS = {"max_steps": 32, "per_device_train_batch_size": 16, "learning_rate": 1e-3}
_OFFLINE = {"sync_every": 32}  # all answers come from the initial model
# For each method: its keys, the key that keeps it close to the initial model, and the values tried for that key.
METHODS: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    # as many answers as the others, each used twice; normalization divides scores by about 4.5, so kl_coef is smaller
    "ppo": (
        {"objective": "ppo", "normalize_scores": True, "learning_rate": 5e-4}
        | {"sync_every": 2, "rollout_epochs": 2, "max_steps": 64},
        "kl_coef",
        (0.4, 0.02),
    ),
    "rloo": ({"objective": "rloo"}, "kl_coef", (2.0, 0.1)),
    "grpo": ({"objective": "grpo"}, "kl_coef", (0.5, 0.02)),
    "online dpo": ({"objective": "dpo"}, "beta", (1.0, 0.1)),
    "offline dpo": ({"objective": "dpo"} | _OFFLINE, "beta", (1.0, 0.1)),
    "online simpo": ({"objective": "simpo"}, "beta", (10.0, 2.0)),
    "offline simpo": ({"objective": "simpo"} | _OFFLINE, "beta", (10.0, 2.0)),
}
FRESHNESS = {"online": 1, "every 8 steps": 8, "every 32 steps": 32, "offline": 64}
_SIMPO = {"objective": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}
_SIMPO |= {"max_steps": 64, "per_device_train_batch_size": 8, "learning_rate": 5e-4}


@dataclass(frozen=True)
class Run:
    """One training run; results are averaged over the seeds in each ``group``."""

    group: str
    judge: str
    seed: int
    options: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """The run's name, for its folder and in ``measured.json``."""
        return f"{self.group}, {self.judge}, seed {self.seed}".replace(" ", "-").replace(",", "")


def method_runs(seeds: Sequence[int], judges: Sequence[str], methods: Sequence[str]) -> Iterator[Run]:
    """Yield the runs seed by seed, so that an interrupted benchmark still covers all methods."""
    for seed, judge, method in product(seeds, judges, methods):
        options, key, values = METHODS[method]
        for value in values:
            yield Run(f"{method}, {key} {value:g}", judge, seed, _METHOD_DEFAULTS | options | {key: value})


def freshness_runs(seeds: Sequence[int]) -> Iterator[Run]:
    """Yield SimPO runs with the exact judge."""
    for seed, (group, every) in product(seeds, FRESHNESS.items()):
        yield Run(group, JUDGES[0], seed, _SIMPO | {"sync_every": every})


class RunMeasurer:
    """Trains each run once and measures it with ``judges``."""

    def __init__(self, workspace: Workspace, judges: Sequence[str]) -> None:
        self._workspace, self._judges = workspace, judges
        self._cache = MeasurementCache(workspace.folder / "measured.json")
        answers = workspace.folder / "start-answers"
        sample(workspace, workspace.demo / "sft", answers, _ANSWERS, 1.0)
        self._start_scores = workspace.scores(answers, "start", JUDGES[:1])[JUDGES[0]]

    def __call__(self, run: Run) -> dict[str, float]:
        """Return each judge's mean score, KL from the initial model in nats per answer, and win rate against it."""
        return self._cache.get_or_measure(run.name, lambda: self._train(run))

    def _train(self, run: Run) -> dict[str, float]:
        workspace, model = self._workspace, self._workspace.folder / run.name
        data = {"model_name_or_path": workspace.demo / "sft", "dataset_name": workspace.demo / "prompts.jsonl"}
        data |= {"annotator": workspace.annotators[run.judge], "seed": run.seed, "output_dir": model}
        simpo("online", *(f"--{key}={value}" for key, value in (_COMMON | data | run.options).items()))
        answers = workspace.folder / f"{run.name}-answers"
        sample(workspace, model, answers, _ANSWERS, 1.0)
        scores = workspace.scores(answers, run.name, self._judges)
        # every answer against each of the initial model's answers to the same prompt
        wins = np.sign(scores[JUDGES[0]][:, :, None] - self._start_scores[:, None, :])
        return {judge: float(values.mean()) for judge, values in scores.items()} | {
            "kl": float(divergence(workspace, model, answers, 1.0).mean()),
            "win rate": float((0.5 + 0.5 * wins).mean()),
        }


def summary(measured: dict[Run, dict[str, float]]) -> dict[str, dict[str, Interval]]:
    """Average over the seeds of each group and judge."""
    groups: dict[str, list[dict[str, float]]] = {}
    for run, metrics in measured.items():
        groups.setdefault(f"{run.group} | {run.judge}", []).append(metrics)
    return {
        name: {metric: mean_interval([one[metric] for one in runs]) for metric in runs[0]}
        for name, runs in groups.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print the results and, for ``methods``, plot them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished simpo demo")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--compare", choices=["methods", "freshness"], default="methods")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--judges", nargs="+", default=list(JUDGES), choices=list(JUDGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # for a model this small, threads would mostly wait for each other
    folder, demo = given.output_dir.resolve(), given.demo.resolve()
    workspace = Workspace(demo, folder, 64, folder / "held-out.jsonl")
    write_lines(workspace.prompts, read_lines(demo / "held-out.jsonl")[:_HELD_OUT])
    if given.compare == "freshness":
        measure, runs = RunMeasurer(workspace, JUDGES[:1]), list(freshness_runs(given.seeds))
    else:
        train_reward(workspace)
        measure, runs = RunMeasurer(workspace, JUDGES), list(method_runs(given.seeds, given.judges, given.methods))
    found = summary({run: measure(run) for run in runs})
    for name, values in found.items():
        print(f"{name}: " + ", ".join(f"{metric} {format_interval(value)}" for metric, value in values.items()))
    if given.compare == "methods":
        best = best_of_n_curves(workspace)
        _plot(folder / "frontier.png", found, best, given.judges)
        print(f"plot: {folder / 'frontier.png'}")


def _plot(
    path: Path,
    found: dict[str, dict[str, Interval]],
    best: dict[str, dict[str, list[Interval]]],
    judges: Sequence[str],
) -> None:
    """Draw one line per method (dashed if offline) with intervals over seeds, and the best-of-N curve."""

    def draw(axes: Axes, trained_by: str, judge: str) -> None:
        for method, color in zip(METHODS, (*COLORS, "#000000"), strict=False):
            groups = [
                values
                for name, values in found.items()
                if name.startswith(f"{method}, ") and name.endswith(f" | {trained_by}")
            ]
            points = sorted((values["kl"].value, values[judge]) for values in groups)
            if points:
                divergences, means = zip(*points, strict=True)
                heights = [mean.value for mean in means]
                spread = [0.0 if mean.low is None else mean.value - mean.low for mean in means]
                style = "--" if method.startswith("offline") else "-"
                axes.errorbar(divergences, heights, spread, color=color, linestyle=style, marker="o", label=method)
        curve = best[trained_by][judge]
        counts = powers_of_two(1 << (len(curve) - 1))
        axes.plot(list(map(best_of_n_kl, counts)), [one.value for one in curve], "k:", label="best of N")

    plot_against_kl(path, judges, "trained against", draw)


if __name__ == "__main__":
    main()
