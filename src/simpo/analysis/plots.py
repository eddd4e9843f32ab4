"""Plots as PNG files: training curves, rates, answer lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from simpo.runs.files import disk_errors, staged_files
from simpo.statistics import Interval

# Distinguishable to color-blind readers and in grayscale (Okabe and Ito 2008).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
AFTER, BEFORE = COLORS[:2]
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 10,
}

_MAX_BINS = 40


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with disk_errors(path), staged_files(path.parent) as folder:
        figure.savefig(folder / path.name, dpi=150)


def plot_training(path: Path, logs: Sequence[Mapping[str, Any]], names: Mapping[str, str], title: str) -> None:
    """Plot metrics over optimizer steps, on training and held-out data, with one panel per metric.

    ``logs`` holds the lines of ``metrics.jsonl``. ``names`` maps each metric to its axis label. The axis of accuracies
    runs from 0 or 0.5 to 1.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left")
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axes, (name, label) in zip(panels, names.items(), strict=True):
            for key, source, color in ((name, "training", BEFORE), (f"eval_{name}", "held out", AFTER)):
                points = [(log["step"], log[key]) for log in logs if key in log]
                if points:
                    marker = "o" if len(points) < 10 else None
                    axes.plot(*zip(*points, strict=True), color=color, label=source, marker=marker)
            axes.set(xlabel="optimizer step", ylabel=label)
            if name.endswith("accuracies"):
                lowest = min((value for line in axes.lines for value in line.get_ydata()), default=0)
                axes.set_ylim(0.5 if lowest >= 0.5 else 0, 1.02)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
        save(figure, path)


def plot_rates(path: Path, rates: Mapping[str, Mapping[str, Interval]], title: str, *, tie_line: str) -> None:
    """Plot shares ``{label: {model: interval}}`` as bars, in percent.

    A line marks 50% at the label ``tie_line``, where it means that the models are equally good.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 1.9 * len(rates), 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        models = list(next(iter(rates.values())))
        width = 0.8 / len(models)
        for number, (model, color) in enumerate(zip(models, (BEFORE, AFTER), strict=True)):
            shares = [by_model[model] for by_model in rates.values()]
            positions = [group + (number - (len(models) - 1) / 2) * width for group in range(len(rates))]
            axes.bar(positions, [100 * share.value for share in shares], width * 0.92, color=color, label=model)
            for x, share in zip(positions, shares, strict=True):
                value, low, high = (
                    100 * (share.value if bound is None else bound) for bound in (share.value, share.low, share.high)
                )
                axes.errorbar(x, value, [[value - low], [high - value]], color="0.15", capsize=3, linewidth=1)
                axes.annotate(f"{value:.0f}", (x, high), (0, 2), textcoords="offset points", ha="center")
        axes.grid(visible=False, axis="x")
        x = list(rates).index(tie_line)
        axes.hlines(50, x - 0.5, x + 0.5, color="0.4", linewidth=0.8, linestyle="--")
        axes.set(ylabel="%", ylim=(0, 108), xticks=range(len(rates)), xticklabels=list(rates))
        axes.legend(frameon=False, ncols=2, loc="upper left")
        save(figure, path)


def plot_lengths(path: Path, lengths: Mapping[str, Sequence[int]], title: str) -> None:
    """Plot histograms of answer lengths in tokens, ``{model: lengths}``, as outlines on shared axes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        longest = max(max(values) for values in lengths.values())
        width = math.ceil(longest / _MAX_BINS)  # in whole tokens, so that every bin covers the same number of lengths
        edges = [number * width + 0.5 for number in range(math.ceil(longest / width) + 1)]
        for (model, values), color in zip(lengths.items(), (BEFORE, AFTER), strict=True):
            mean = sum(values) / len(values)
            axes.hist(values, edges, histtype="step", color=color, linewidth=2, label=f"{model} (mean {mean:.1f})")
            axes.axvline(mean, color=color, linewidth=1.2, linestyle="--")
        axes.set(xlabel="answer length in tokens, including the end-of-turn token", ylabel="answers")
        axes.legend(frameon=False)
        save(figure, path)
