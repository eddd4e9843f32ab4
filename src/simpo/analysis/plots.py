"""Figures of a run as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simpo.atomic import disk_errors, staged_files
from simpo.statistics import Interval

# Colours that stay apart for colour-blind readers and in grey (Okabe and Ito 2008).
BEFORE, AFTER = "#E69F00", "#0072B2"
_BINS = 40  # at most, of a histogram
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 10,
}


def plot_training(path: Path, logs: Sequence[Mapping[str, Any]], names: Mapping[str, str], title: str) -> None:
    """Curves of a run's ``metrics.jsonl`` over its optimizer steps, one panel each.

    Args:
        path: the PNG file.
        logs: the lines of the file.
        names: metric -> label of its axis, for every panel.
        title: of the whole.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
        figure.suptitle(title)
        for axes, (name, label) in zip(figure.subplots(1, len(names), squeeze=False)[0], names.items(), strict=True):
            _curve(axes, logs, name, "training", BEFORE)
            _curve(axes, logs, f"eval_{name}", "held out", AFTER)
            axes.set(xlabel="optimizer step", ylabel=label)
            if axes.lines:
                axes.legend(frameon=False)
        save(figure, path)


def _curve(axes: Axes, logs: Sequence[Mapping[str, Any]], name: str, label: str, colour: str) -> None:
    points = [(line["step"], line[name]) for line in logs if name in line]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o" if len(points) < 10 else None)


def plot_rates(path: Path, rates: Mapping[str, Mapping[str, Interval]], title: str, *, even: str) -> None:
    """Shares with their intervals as bars, in percent.

    Args:
        path: the PNG file.
        rates: ``{what: {model: interval}}``.
        title: of the whole.
        even: the one of ``rates`` of which a half says that no model is better; it gets a line there.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 1.9 * len(rates), 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        models = list(dict.fromkeys(model for shares in rates.values() for model in shares))
        width = 0.8 / len(models)
        for number, (model, colour) in enumerate(zip(models, (BEFORE, AFTER), strict=True)):
            for place, shares in enumerate(rates.values()):
                _bar(axes, place + (number - (len(models) - 1) / 2) * width, shares[model], width, colour, model)
        axes.grid(visible=False, axis="x")
        place = list(rates).index(even)
        axes.hlines(50, place - 0.5, place + 0.5, color="0.4", linewidth=0.8, linestyle="--")
        axes.set(ylabel="%", ylim=(0, 108), xticks=range(len(rates)), xticklabels=list(rates))
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), frameon=False, ncols=2, loc="upper left")
        save(figure, path)


def _bar(axes: Axes, place: float, share: Interval, width: float, colour: str, label: str) -> None:
    value = 100 * share.value
    low, high = (value if bound is None else 100 * bound for bound in (share.low, share.high))
    axes.bar(place, value, width * 0.92, color=colour, label=label)
    axes.errorbar(place, value, [[value - low], [high - value]], color="0.15", capsize=3, linewidth=1)
    axes.annotate(f"{value:.0f}", (place, high), (0, 2), textcoords="offset points", ha="center", va="bottom")


def plot_lengths(path: Path, lengths: Mapping[str, Sequence[int]], title: str) -> None:
    """Histograms of answers' lengths in tokens, ``{model: lengths}``, on one pair of axes; PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        longest = max(max(values) for values in lengths.values())
        width = math.ceil(longest / _BINS)  # whole tokens, so that every bin can be reached by as many lengths
        edges = [number * width + 0.5 for number in range(math.ceil(longest / width) + 1)]
        for (model, values), colour in zip(lengths.items(), (BEFORE, AFTER), strict=True):
            mean = sum(values) / len(values)
            axes.hist(values, edges, color=colour, alpha=0.6, label=f"{model} (mean {mean:.1f})")
            axes.axvline(mean, color=colour, linewidth=1.5)
        axes.set(xlabel="tokens of an answer, end of turn included", ylabel="answers")
        axes.legend(frameon=False)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the file is whole or absent."""
    with disk_errors(path), staged_files(path.parent) as folder:
        figure.savefig(folder / path.name, dpi=150)
