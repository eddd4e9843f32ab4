"""What on-policy rounds do: win rates against the start as different judges see them, and the drift, as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simpo.analysis.plots import AFTER, BEFORE, STYLE, save
from simpo.statistics import Interval

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
