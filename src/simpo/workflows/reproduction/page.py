"""``reproduce.html``: what was claimed, what came out, and how certain it is, in one file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simpo import __version__
from simpo.statistics import Interval, mean_interval
from simpo.workflows.reproduction.study import METRICS, Measured, Outcome, Study

_WIDTH = 100.0  # of a figure, in percent
_SHOWN = 3  # significant digits


class Row(NamedTuple):
    """One arm in a figure: positions are percentages of the width, None where there is no mean."""

    name: str
    text: str
    point: float | None
    low: float | None
    high: float | None


def render(
    studies: Sequence[Study],
    measured: Mapping[str, Mapping[str, Measured]],
    outcomes: Mapping[str, Sequence[Outcome]],
    chosen: Mapping[tuple[str, str], Mapping[str, Any]],
) -> str:
    """The page.

    Args:
        studies: those that were run.
        measured: the numbers of every study's arms.
        outcomes: of every study's claims.
        chosen: the settings of every study and arm, after tuning.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"interval": interval_text, "number": number_text}
    verdicts = [outcome.verdict for found in outcomes.values() for outcome in found]
    figures = {
        study.name: {
            metric: _figure(measured[study.name], metric) for metric in {claim.metric: None for claim in study.claims}
        }
        for study in studies
    }
    return environment.get_template("reproduce.html").render(
        studies=studies,
        outcomes=outcomes,
        figures=figures,
        tables={
            study.name: {arm: [mean_text(values[metric]) for metric in METRICS] for arm, values in arms.items()}
            for study in studies
            for arms in [measured[study.name]]
        },
        metrics=METRICS,
        chosen=chosen,
        verdicts=verdicts,
        seeds=_seeds(measured),
        version=__version__,
    )


def _seeds(measured: Mapping[str, Mapping[str, Measured]]) -> str:
    """The number of training seeds of the studies' models."""
    counts = sorted({len(values) for arms in measured.values() for arm in arms.values() for values in arm.values()})
    least, most = counts[0], counts[-1]
    return f"{most} training seed{'s' if most != 1 else ''}" if least == most else f"{least} to {most} training seeds"


def _figure(arms: Mapping[str, Measured], metric: str) -> list[Row]:
    """The mean of every arm with its interval, on a common scale."""
    found = {name: mean_interval(values[metric]) for name, values in arms.items()}
    bounds = [bound for one in found.values() for bound in (one.low, one.high, one.value)]
    ends = [bound for bound in bounds if bound is not None and math.isfinite(bound)] or [0.0]
    least, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float | None, otherwise: float) -> float | None:
        value = otherwise if value is None else value
        return _WIDTH * (value - least) / span if math.isfinite(value) else None

    return [
        Row(
            name,
            mean_text(arms[name][metric]),
            place(one.value, one.value),
            place(one.low, one.value),
            place(one.high, one.value),
        )
        for name, one in found.items()
    ]


def mean_text(values: np.ndarray) -> str:
    """The mean of ``values`` ``[seeds]`` with its interval; where one of them is undefined, with how many seeds."""
    undefined = int((~np.isfinite(values)).sum())
    return f"undefined with {undefined} of {len(values)} seeds" if undefined else interval_text(mean_interval(values))


def number_text(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.{_SHOWN}g}" if math.isfinite(value) else "undefined"


def interval_text(found: Interval) -> str:
    """A number with its interval, where there is one."""
    if found.low is None or found.high is None or not math.isfinite(found.value):
        return number_text(found.value)
    return f"{number_text(found.value)} [{number_text(found.low)}, {number_text(found.high)}]"
