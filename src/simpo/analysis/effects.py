"""What each knob of a sweep does to the result, as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simpo.analysis.plots import AFTER, BEFORE, STYLE, save
from simpo.statistics import Interval

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
