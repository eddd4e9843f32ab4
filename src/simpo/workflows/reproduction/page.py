"""``reproduce.html``: what was claimed, what came out, and how certain it is, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simpo import __version__
from simpo.statistics import Interval, mean_interval
from simpo.workflows.reproduction.study import METRICS, Measured, Outcome, Study

_WIDTH = 100.0  # of a figure, in percent
_SHOWN = 3  # significant digits


class Row(NamedTuple):
    """One arm in a figure: positions are percentages of the width."""

    name: str
    text: str
    point: float
    low: float
    high: float


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
        study.name: {metric: _figure(measured[study.name], metric) for metric in _metrics_of(study)}
        for study in studies
    }
    return environment.get_template("reproduce.html").render(
        studies=studies,
        outcomes=outcomes,
        figures=figures,
        tables={study.name: _table(measured[study.name]) for study in studies},
        metrics=METRICS,
        chosen=chosen,
        verdicts=verdicts,
        version=__version__,
    )


def _metrics_of(study: Study) -> list[str]:
    return list(dict.fromkeys(claim.metric for claim in study.claims))


def _figure(arms: Mapping[str, Measured], metric: str) -> list[Row]:
    """The mean of every arm with its interval, on a common scale."""
    found = {name: mean_interval(values[metric]) for name, values in arms.items()}
    ends = [bound for one in found.values() for bound in (one.low, one.high, one.value) if bound is not None]
    least, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float | None, otherwise: float) -> float:
        return _WIDTH * ((otherwise if value is None else value) - least) / span

    return [
        Row(
            name,
            interval_text(one),
            place(one.value, one.value),
            place(one.low, one.value),
            place(one.high, one.value),
        )
        for name, one in found.items()
    ]


def _table(arms: Mapping[str, Measured]) -> dict[str, list[str]]:
    return {name: [interval_text(mean_interval(values[metric])) for metric in METRICS] for name, values in arms.items()}


def number_text(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.{_SHOWN}g}"


def interval_text(found: Interval) -> str:
    """A number with its interval, where there is one."""
    if found.low is None or found.high is None:
        return number_text(found.value)
    return f"{number_text(found.value)} [{number_text(found.low)}, {number_text(found.high)}]"
