"""Plots of runs, sweeps and loops as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simpo.runs.atomic import disk_errors, staged_files
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


# ---- What each knob of a sweep does to the result, as a PNG file.


_TICKS = 10  # more values than that are points of a continuous axis


_WIDE = 10  # ratio from which on that is logarithmic


def plot_effects(
    path: Path, effects: Mapping[str, Sequence[tuple[str, Interval]]], label: str, *, smaller_is_better: bool = False
) -> None:
    """A panel for every knob: each trial a point over its value, and a line through the best of every value.

    Args:
        path: the PNG file.
        effects: of every knob, its value and the result of each trial, with its interval where it has one.
        label: what the result is.
        smaller_is_better: which end of the results is the best.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1 + 3.2 * len(effects), 3.4), layout="constrained")
        panels = figure.subplots(1, len(effects), squeeze=False, sharey=True)[0]
        for axes, (knob, trials) in zip(panels, effects.items(), strict=True):
            places = _places(axes, [value for value, _ in trials])
            results = [result.value for _, result in trials]
            axes.plot(places, results, "o", color=AFTER, alpha=0.5, label="a trial")
            bounded = [
                (place, found) for place, (_, found) in zip(places, trials, strict=True) if found.low is not None
            ]
            for place, found in bounded:
                axes.vlines(place, found.low, found.high, color=AFTER, alpha=0.3)
            best = _best(places, results, smaller_is_better)
            axes.plot(*zip(*best, strict=True), color=BEFORE, label="the best there")
            axes.set_xlabel(knob)
        panels[0].set_ylabel(label)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
        save(figure, path)


def _places(axes: Axes, values: Sequence[str]) -> list[float]:
    """Where the values stand on the horizontal axis, which is set up for them: a few side by side, many to scale."""
    numbers: dict[str, float] = {}
    with suppress(ValueError):
        numbers = {value: float(value) for value in values}
    distinct = sorted(set(values), key=lambda value: numbers[value]) if numbers else list(dict.fromkeys(values))
    if numbers and len(distinct) > _TICKS:
        low, high = numbers[distinct[0]], numbers[distinct[-1]]
        axes.set_xscale("log" if low > 0 and high / low >= _WIDE else "linear")
        return [numbers[value] for value in values]
    axes.set_xticks(range(len(distinct)), distinct)
    axes.set_xlim(-0.5, len(distinct) - 0.5)
    return [float(distinct.index(value)) for value in values]


def _best(places: Sequence[float], results: Sequence[float], smaller_is_better: bool) -> list[tuple[float, float]]:
    better = min if smaller_is_better else max
    return [
        (place, better(result for other, result in zip(places, results, strict=True) if other == place))
        for place in sorted(set(places))
    ]


# ---- What on-policy rounds do: win rates against the start as different judges see them, and the drift, as a
# PNG file.


# Further colours of the same palette, for a third judge and more.
COLOURS = (AFTER, BEFORE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def plot_rounds(path: Path, win_rates: Mapping[str, Sequence[Interval]], kl: Sequence[Interval]) -> None:
    """Win rates over the rounds, one line a judge, and over how far each round is from the start; PNG.

    Where judges part, the one that was trained on has been exploited.

    Args:
        path: the file.
        win_rates: for every judge, each round's.
        kl: each round's drift from the start, in nats.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        over_rounds, over_kl = figure.subplots(1, 2, sharey=True)
        for number, (judge, shares) in enumerate(win_rates.items()):
            colour = COLOURS[number % len(COLOURS)]
            from_start = [_EVEN, *shares]
            line(over_rounds, range(len(from_start)), from_start, colour, judge, scale=100)
            line(over_kl, [0, *(one.value for one in kl)], from_start, colour, judge, scale=100)
        for axes in (over_rounds, over_kl):
            axes.axhline(50, color="0.4", linewidth=0.8, linestyle="--")
        over_rounds.set(
            xlabel="round (0: the start)", ylabel="win rate against the start, %", xticks=range(len(kl) + 1)
        )
        over_kl.set(xlabel="KL from the start, nats an answer")
        over_rounds.legend(frameon=False, title="judge")
        save(figure, path)


# The start against itself.
_EVEN = Interval(0.5, None, None, 0, "")


def line(
    axes: Axes, places: Sequence[float] | range, found: Sequence[Interval], colour: str, label: str, *, scale: float = 1
) -> None:
    """Points with their intervals, and a line through them."""
    values = [scale * one.value for one in found]
    below = [0.0 if one.low is None else scale * (one.value - one.low) for one in found]
    above = [0.0 if one.high is None else scale * (one.high - one.value) for one in found]
    axes.errorbar(places, values, [below, above], color=colour, marker="o", capsize=3, linewidth=1.4, label=label)
