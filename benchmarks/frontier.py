"""Online training on the tiny world: reward against KL to the start model, and how often answers must be fresh.

    simpo demo --output_dir runs/demo-1
    python -m benchmarks.frontier runs/demo-1 --output_dir runs/frontier
    python -m benchmarks.frontier runs/demo-1 --output_dir runs/frontier --compare freshness

``methods`` trains with PPO, RLOO, GRPO, DPO and SimPO, online and offline, with several KL coefficients (or betas) and
seeds, against the exact judge and against a reward model that learnt from little, and adds the best of N. ``freshness``
trains SimPO on answers that are sampled at every step, every 8 and 32 steps, and once: the same number of them. Every
stage is a run of a command, and every measurement is kept, so that the same call continues after a kill.
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
from benchmarks.figures import Figures, in_words
from benchmarks.on_policy import (
    JUDGES,
    Place,
    best_of_n_curves,
    divergence,
    plot_against_kl,
    sample,
    simpo,
    sizes,
    train_reward,
)
from simpo.analysis.plots import COLORS
from simpo.runs.files import read_lines, write_lines
from simpo.statistics import Interval, mean_interval

_ANSWERS, _HELD_OUT = 4, 100  # to a prompt, prompts
_COMMON: dict[str, Any] = {
    "num_generations": _ANSWERS, "max_new_tokens": 48, "max_length": 128, "generation_batch_size": 256,
    "save_strategy": "no", "report_to": "none", "logging_steps": 16,
}  # fmt: skip
_SHARED = {"max_steps": 32, "per_device_train_batch_size": 16, "learning_rate": 1e-3}  # by all methods
_ONCE = {"sync_every": 32}  # offline: all answers are the start model's
# For each method its keys, the key that keeps it near the start, and the values of that.
METHODS: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    # as many answers as the others, each used twice; the scores are divided by about 4.5, and kl_coef with them
    "ppo": (
        {"objective": "ppo", "normalize_scores": True, "learning_rate": 5e-4}
        | {"sync_every": 2, "rollout_epochs": 2, "max_steps": 64},
        "kl_coef",
        (0.4, 0.02),
    ),
    "rloo": ({"objective": "rloo"}, "kl_coef", (2.0, 0.1)),
    "grpo": ({"objective": "grpo"}, "kl_coef", (0.5, 0.02)),
    "online dpo": ({"objective": "dpo"}, "beta", (1.0, 0.1)),
    "offline dpo": ({"objective": "dpo"} | _ONCE, "beta", (1.0, 0.1)),
    "online simpo": ({"objective": "simpo"}, "beta", (10.0, 2.0)),
    "offline simpo": ({"objective": "simpo"} | _ONCE, "beta", (10.0, 2.0)),
}
FRESHNESS = {"online": 1, "every 8 steps": 8, "every 32 steps": 32, "offline": 64}
_SIMPO = {"objective": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}
_SIMPO |= {"max_steps": 64, "per_device_train_batch_size": 8, "learning_rate": 5e-4}


@dataclass(frozen=True)
class Run:
    """One training: ``name`` is its folder's, ``group`` what its seeds are averaged over."""

    group: str
    judge: str
    seed: int
    options: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """Of its folder, and in ``figures.json``."""
        return f"{self.group}, {self.judge}, seed {self.seed}".replace(" ", "-").replace(",", "")


def runs_of_methods(seeds: Sequence[int], judges: Sequence[str], methods: Sequence[str]) -> Iterator[Run]:
    """Seed by seed, so that a call that was stopped has all methods."""
    for seed, judge, method in product(seeds, judges, methods):
        options, key, values = METHODS[method]
        for value in values:
            yield Run(f"{method}, {key} {value:g}", judge, seed, _SHARED | options | {key: value})


def runs_of_freshness(seeds: Sequence[int]) -> Iterator[Run]:
    """SimPO with the exact judge."""
    for seed, (group, every) in product(seeds, FRESHNESS.items()):
        yield Run(group, JUDGES[0], seed, _SIMPO | {"sync_every": every})


class Measuring:
    """Trains and measures runs, each once; ``judges`` measure."""

    def __init__(self, place: Place, judges: Sequence[str]) -> None:
        self._place, self._judges = place, judges
        self._figures = Figures(place.folder / "measured.json")
        sample(place, place.demo / "sft", place.folder / "start-answers", _ANSWERS, 1.0)
        self._start = place.scores(place.folder / "start-answers", "start", JUDGES[:1])[JUDGES[0]]

    def __call__(self, run: Run) -> dict[str, float]:
        """The mean score by every judge, the KL from the start in nats per answer, and the win rate against it."""
        return self._figures.once(run.name, lambda: self._train(run))

    def _train(self, run: Run) -> dict[str, float]:
        place, model = self._place, self._place.folder / run.name
        data = {"model_name_or_path": place.demo / "sft", "dataset_name": place.demo / "prompts.jsonl"}
        own = {"annotator": place.annotators[run.judge], "seed": run.seed, "output_dir": model}
        simpo("online", *(f"--{key}={value}" for key, value in (_COMMON | data | own | run.options).items()))
        responses = place.folder / f"{run.name}-answers"
        sample(place, model, responses, _ANSWERS, 1.0)
        scores = place.scores(responses, run.name, self._judges)
        wins = np.sign(scores[JUDGES[0]][:, :, None] - self._start[:, None, :])  # every answer with every other
        return {judge: float(values.mean()) for judge, values in scores.items()} | {
            "kl": float(divergence(place, model, responses, 1.0).mean()),
            "win rate": float((0.5 + 0.5 * wins).mean()),
        }


def summary(measured: dict[Run, dict[str, float]]) -> dict[str, dict[str, Interval]]:
    """For every group and judge the means over seeds."""
    groups: dict[str, list[dict[str, float]]] = {}
    for run, found in measured.items():
        groups.setdefault(f"{run.group} | {run.judge}", []).append(found)
    return {
        name: {what: mean_interval([one[what] for one in found]) for what in found[0]} for name, found in groups.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print a table, and for ``methods`` plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished simpo demo")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--compare", choices=["methods", "freshness"], default="methods")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--judges", nargs="+", default=list(JUDGES), choices=list(JUDGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # for a model this small, threads wait for one another longer than they work
    folder, demo = given.output_dir.resolve(), given.demo.resolve()
    place = Place(demo, folder, 64, folder / "held-out.jsonl")
    write_lines(place.prompts, read_lines(demo / "held-out.jsonl")[:_HELD_OUT])
    if given.compare == "freshness":
        measure, runs = Measuring(place, JUDGES[:1]), list(runs_of_freshness(given.seeds))
    else:
        train_reward(place)
        measure, runs = Measuring(place, JUDGES), list(runs_of_methods(given.seeds, given.judges, given.methods))
    found = summary({run: measure(run) for run in runs})
    for name, values in found.items():
        print(f"{name}: " + ", ".join(f"{what} {in_words(value)}" for what, value in values.items()))
    if given.compare == "methods":
        best = best_of_n_curves(place)
        _plot(folder / "frontier.png", found, best, given.judges)
        print(f"plot: {folder / 'frontier.png'}")


def _plot(
    path: Path,
    found: dict[str, dict[str, Interval]],
    best: dict[str, dict[str, list[Interval]]],
    judges: Sequence[str],
) -> None:
    """A line for each method, dashed if it is offline, with intervals over seeds, and the best of N."""

    def draw(axes: Axes, trained_by: str, judge: str) -> None:
        for method, color in zip(METHODS, (*COLORS, "#000000"), strict=False):
            own = [
                values
                for name, values in found.items()
                if name.startswith(f"{method}, ") and name.endswith(f" | {trained_by}")
            ]
            points = sorted((values["kl"].value, values[judge]) for values in own)
            if points:
                places, means = zip(*points, strict=True)
                heights = [mean.value for mean in means]
                spread = [0.0 if mean.low is None else mean.value - mean.low for mean in means]
                style = "--" if method.startswith("offline") else "-"
                axes.errorbar(places, heights, spread, color=color, linestyle=style, marker="o", label=method)
        curve = best[trained_by][judge]
        counts = sizes(1 << (len(curve) - 1))
        axes.plot(list(map(best_of_n_kl, counts)), [one.value for one in curve], "k:", label="best of N")

    plot_against_kl(path, judges, "trained against", draw)


if __name__ == "__main__":
    main()
