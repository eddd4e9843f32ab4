"""``results.json``: the figures that a command ends in, written once and printed from the file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from simpo.errors import SimpoError
from simpo.runs.atomic import write_text
from simpo.statistics import Interval

FILE_NAME = "results.json"
SCHEMA = 1

Stage = Literal["before", "after"]

_WIDEST = 1000  # columns of text
# Column headings in their order; None is the stage of a metric that has none.
_HEADINGS: dict[Stage | None, str] = {None: "value", "before": "before", "after": "after"}


@dataclass(frozen=True)
class Metric:
    """One measured figure; the fields are the keys of ``results.json``.

    Attributes:
        name: what was measured, e.g. ``eval_rewards/accuracies``.
        stage: before or after training; None where that makes no difference.
        value: the figure; None where it is not a finite number.
        n: number of items that it was measured on.
        low: lower bound of its interval.
        high: upper bound of its interval.
        method: how the interval was found.
    """

    name: str
    value: float | None
    stage: Stage | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    method: str | None = None

    @classmethod
    def of(cls, name: str, found: Interval, stage: Stage | None = None, *, method: str | None = None) -> Metric:
        """A metric with an interval; ``method`` replaces the interval's own description of how it was found."""
        return cls(name, found.value, stage, found.n, found.low, found.high, method or found.method)

    @property
    def interval(self) -> Interval:
        """The value with its interval, of a metric that has a value."""
        assert self.value is not None
        return Interval(self.value, self.low, self.high, self.n or 0, self.method or "")


@dataclass(frozen=True)
class Results:
    """What a ``results.json`` holds."""

    command: str
    fingerprint: str
    metrics: list[Metric]


def fingerprint(*parts: Any) -> str:
    """SHA-256 (64 hex digits) over what determines a result: JSON values, mappings in any order.

    Raises:
        TypeError: a part has no canonical form (only JSON values have: no paths, no objects).
        ValueError: a part holds NaN or an infinity.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_results(folder: Path, *, command: str, fingerprint: str, metrics: Sequence[Metric]) -> Path:
    """Write ``folder/results.json`` and return its path; the file is whole or, after a crash, the old one.

    JSON has no NaN and no infinities: such a value or bound is stored as null, so that a run that diverged
    still has its other figures.

    Raises:
        ValueError: two metrics have the same name and stage.
        SimpoError: the folder cannot be written to.
    """
    if repeated := _repeated(metrics):
        raise ValueError(f"the metric {repeated} occurs twice")
    document = {
        "schema": SCHEMA,
        "command": command,
        "fingerprint": fingerprint,
        "metrics": [_row(metric) for metric in metrics],
    }
    path = Path(folder) / FILE_NAME
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _repeated(metrics: Iterable[Metric]) -> str | None:
    seen = set()
    for metric in metrics:
        if (metric.name, metric.stage) in seen:
            return f"{metric.name} ({_HEADINGS[metric.stage]})"
        seen.add((metric.name, metric.stage))
    return None


def _row(metric: Metric) -> dict[str, Any]:
    return {
        "name": metric.name,
        "stage": metric.stage,
        "value": _finite(metric.value),
        "n": None if metric.n is None else int(metric.n),
        "low": _finite(metric.low),
        "high": _finite(metric.high),
        "method": metric.method,
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def read_results(path: Path) -> Results:
    """Read and validate a ``results.json``.

    Raises:
        SimpoError: the file cannot be read or does not follow the schema; names the file and the key.
    """
    document = _load(path)
    _check_object(document, _DOCUMENT, f"{path}: ")
    if document["schema"] != SCHEMA:
        raise SimpoError(f"{path}: schema: expected {SCHEMA}, got {document['schema']!r}")
    for i, row in enumerate(document["metrics"]):
        place = f"{path}: metrics[{i}]"
        _check_object(row, _METRIC, f"{place}.")
        if row["stage"] not in _HEADINGS:
            raise SimpoError(f"{place}.stage: expected before, after or null, got {row['stage']!r}")
    metrics = [Metric(**row) for row in document["metrics"]]
    if repeated := _repeated(metrics):
        raise SimpoError(f"{path}: metrics: {repeated} occurs twice")
    return Results(document["command"], document["fingerprint"], metrics)


# The schema: what each key holds, in the words of the error; the words are looked up in _TYPES.
_DOCUMENT = {"schema": "a whole number", "command": "text", "fingerprint": "text", "metrics": "a list"}
_METRIC = {
    "name": "text",
    "stage": "text or null",
    "value": "a number or null",
    "n": "a whole number or null",
    "low": "a number or null",
    "high": "a number or null",
    "method": "text or null",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "a whole number": (int,),
    "a number": (int, float),
    "a list": (list,),
    "null": (type(None),),
}


def _load(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise SimpoError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise SimpoError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise SimpoError(f"{path}: {error}") from error


def _check_object(value: Any, schema: dict[str, str], place: str) -> None:
    if not isinstance(value, dict):
        raise SimpoError(f"{place.rstrip(' .:')}: expected an object, got {value!r}")
    for key in [*schema, *value]:
        if key not in value:
            raise SimpoError(f"{place}{key}: missing")
        if key not in schema:
            raise SimpoError(f"{place}{key}: unknown key")
        if not _holds(value[key], schema[key]):
            raise SimpoError(f"{place}{key}: expected {schema[key]}, got {value[key]!r}")


def _holds(value: Any, kinds: str) -> bool:
    # bool is a subclass of int, and true is not a number.
    types = tuple(kind for name in kinds.split(" or ") for kind in _TYPES[name])
    return isinstance(value, types) and not isinstance(value, bool)


def print_results(
    path: Path, console: Console | None = None, *, headings: Mapping[Stage | None, str] | None = None
) -> None:
    """Print the figures of a ``results.json``: those with stages side by side, with their intervals, then the others.

    Args:
        path: the file.
        console: where to print.
        headings: of the columns of the stages, where they have names of their own.

    Raises:
        SimpoError: as :func:`read_results`.
    """
    results = read_results(path)
    names: dict[Stage | None, str] = {**_HEADINGS}
    names.update(headings or {})
    console = console or Console()
    staged = [metric for metric in results.metrics if metric.stage is not None]
    single = [metric for metric in results.metrics if metric.stage is None]
    if staged:
        print_whole(console, _table(staged, ("before", "after"), names, f"simpo {results.command}"))
    if single:
        print_whole(console, _table(single, (None,), names, None if staged else f"simpo {results.command}"))


def print_whole(console: Console, table: Table) -> None:
    """Print a table as wide as it is: a figure that is cropped is a wrong one."""
    before = console.width
    console.width = _WIDEST
    console.width = max(before, Measurement.get(console, console.options, table).maximum)
    console.print(table)
    console.width = before


def _table(
    metrics: Sequence[Metric], stages: Sequence[Stage | None], headings: Mapping[Stage | None, str], title: str | None
) -> Table:
    rows: dict[str, dict[Stage | None, Metric]] = {}
    for metric in metrics:
        rows.setdefault(metric.name, {})[metric.stage] = metric
    # Text throughout, so that rich does not take the brackets of an interval or a name for its markup.
    table = Table(title=Text(title) if title else None, caption=_caption(metrics), box=SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    for stage in stages:
        table.add_column(headings[stage], justify="right", no_wrap=True)
    counts = {name: _counts(cells.values()) for name, cells in rows.items()}
    shared = set(counts.values())  # a column of one number would only take room
    if len(shared) == 1:
        table.caption = Text("; ".join(filter(None, [str(table.caption or ""), *(f"n = {n}" for n in shared if n)])))
    else:
        table.add_column("n", justify="right", no_wrap=True)
    for name, cells in rows.items():
        figures = [Text(_figure(cells[stage]) if stage in cells else "") for stage in stages]
        table.add_row(Text(name), *figures, *([] if len(shared) == 1 else [counts[name]]))
    return table


def _caption(metrics: Iterable[Metric]) -> Text | None:
    methods = sorted({metric.method for metric in metrics if metric.method})
    return Text(f"methods: {', '.join(methods)}") if methods else None


def _figure(metric: Metric) -> str:
    value = "-" if metric.value is None else _number(metric.value)
    if metric.low is None or metric.high is None:
        return value
    return f"{value} [{metric.low:.3g}, {metric.high:.3g}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _counts(metrics: Iterable[Metric]) -> str:
    """Number of items, once where the stages agree: ``500`` or ``500 / 480``."""
    counts = dict.fromkeys(str(metric.n) for metric in metrics if metric.n is not None)
    return " / ".join(counts)
