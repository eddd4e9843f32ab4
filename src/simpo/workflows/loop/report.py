"""What a loop ends in: every round's figures, in one table, one plot and ``results.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simpo.analysis.plots import plot_rounds
from simpo.runs.results import FILE_NAME, Metric, print_whole, read_results, write_results
from simpo.statistics import Interval

PLOT = "rounds.png"
_WIN_RATE = "win_rate/"
_DETAILS = ("agreement/", "kappa/")  # not in the table

Rounds = Mapping[int, Sequence[Metric]]


def write_report(folder: Path, rounds: Rounds, *, fingerprint: str, last_good: int) -> None:
    """Write the figures of all rounds and the plot.

    Args:
        folder: of the loop.
        rounds: the figures of every round.
        fingerprint: of the loop.
        last_good: the last round that no stop criterion refused; 0 if there is none.
    """
    metrics = [
        Metric("rounds", len(rounds)),
        Metric("last_good_round", last_good),
        *(
            dataclasses.replace(metric, name=f"round-{number}/{metric.name}")
            for number, found in rounds.items()
            for metric in found
        ),
    ]
    win_rates: dict[str, list[Interval]] = {}
    for found in rounds.values():
        for metric in found:
            if metric.name.startswith(_WIN_RATE):
                win_rates.setdefault(metric.name.removeprefix(_WIN_RATE), []).append(_interval(metric))
    kl = [_interval(metric) for found in rounds.values() for metric in found if metric.name == "kl"]
    plot_rounds(folder / PLOT, win_rates, kl)
    write_results(folder, command="loop", fingerprint=fingerprint, metrics=metrics)


def print_report(folder: Path) -> None:
    """Print a row for every round.

    Raises:
        SimpoError: as :func:`simpo.runs.results.read_results`.
    """
    rows: dict[str, dict[str, Metric]] = {}
    for metric in read_results(folder / FILE_NAME).metrics:
        number, slash, name = metric.name.partition("/")
        if slash and metric.stage != "before" and not name.startswith(_DETAILS):
            rows.setdefault(number.removeprefix("round-"), {})[name] = metric
    columns = list(dict.fromkeys(name for found in rows.values() for name in found))
    table = Table(title=Text("simpo loop: every round against the start"), box=SIMPLE_HEAD)
    for name in ("round", *columns):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for number, found in rows.items():
        table.add_row(number, *(_cell(found[name]) if name in found else "" for name in columns))
    print_whole(Console(), table)


def win_rate(metrics: Sequence[Metric]) -> Metric:
    """By the first judge."""
    return next(metric for metric in metrics if metric.name.startswith(_WIN_RATE))


def kl(metrics: Sequence[Metric]) -> Metric:
    """The drift."""
    return next(metric for metric in metrics if metric.name == "kl")


def _interval(metric: Metric) -> Interval:
    value = float("nan") if metric.value is None else metric.value
    return Interval(value, metric.low, metric.high, metric.n or 0, metric.method or "")


def _cell(metric: Metric) -> Text:
    if metric.value is None:
        return Text("-")
    bounds = "" if metric.low is None or metric.high is None else f" [{metric.low:.3g}, {metric.high:.3g}]"
    return Text(f"{metric.value:.3g}{bounds}")
