"""``results.json``: the metrics of a command. What is printed is read back from this file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from simpo.errors import third_party
from simpo.runs.files import write_text
from simpo.statistics import Interval

FILE_NAME = "results.json"
SCHEMA = 1

Stage = Literal["before", "after"]
# Scores of all held-out rows, and some of the rows as text, before and after training.
HELD_OUT: dict[Stage, str] = {"before": "held_out_before.jsonl", "after": "held_out_after.jsonl"}
EXAMPLES: dict[Stage, str] = {"before": "examples_before.jsonl", "after": "examples_after.jsonl"}

_MAX_WIDTH = 1000  # columns of text
# Column headings, in order; metrics without a stage are listed under None.
_HEADINGS: dict[Stage | None, str] = {None: "value", "before": "before", "after": "after"}


@dataclass(frozen=True)
class Metric:
    """One measured number. The fields are the keys of ``results.json``."""

    name: str  # e.g. `eval_rewards/accuracies`
    value: float | None  # None if undefined or not finite
    stage: Stage | None = None  # before or after training; None if that does not apply
    n: int | None = None  # number of items measured
    low: float | None = None  # lower bound of the interval
    high: float | None = None  # upper bound of the interval
    method: str | None = None  # how the interval was computed

    @classmethod
    def of(cls, name: str, found: Interval | None, stage: Stage | None = None, *, method: str | None = None) -> Metric:
        """Create a metric from an interval, or one without a value from None; ``method`` overrides the interval's."""
        if found is None:
            return cls(name, None, stage)
        return cls(name, found.value, stage, found.n, found.low, found.high, method or found.method)

    @property
    def text(self) -> str:
        """The value with its interval, as in ``0.6125 [0.584, 0.64]``; ``-`` if there is no value."""
        text = "-"
        if self.value is not None:
            text = f"{self.value:,.0f}" if abs(self.value) >= 10_000 else f"{self.value:.4g}"
        return text if self.low is None or self.high is None else f"{text} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def interval(self) -> Interval:
        """The value with its interval; the metric must have a value."""
        assert self.value is not None
        return Interval(self.value, self.low, self.high, self.n or 0, self.method or "")


@dataclass(frozen=True)
class Results:
    """The contents of a ``results.json``."""

    command: str
    fingerprint: str
    metrics: list[Metric]


def fingerprint(*parts: Any) -> str:
    """Hash what determines a result: the SHA-256 (64 hex digits) of JSON values, with mappings in any order.

    Raises:
        TypeError: a part is not a JSON value, such as a path or an object.
        ValueError: a part contains NaN or infinity.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_results(folder: Path, *, command: str, fingerprint: str, metrics: Sequence[Metric]) -> Path:
    """Write ``folder/results.json`` atomically and return its path.

    JSON has no NaN or infinity. They are stored as null, so that a diverged run keeps its other metrics.

    Raises:
        ValueError: two metrics have the same name and stage.
        SimpoError: the folder cannot be written to.
    """
    rows: dict[tuple[str, Stage | None], dict[str, Any]] = {}
    for metric in metrics:
        key = metric.name, metric.stage
        if key in rows:
            raise ValueError(f"duplicate metric {metric.name} ({_HEADINGS[metric.stage]})")
        numbers = {name: _finite(getattr(metric, name)) for name in ("value", "low", "high")}
        rows[key] = asdict(metric) | numbers | {"n": None if metric.n is None else int(metric.n)}
    document = {"schema": SCHEMA, "command": command, "fingerprint": fingerprint, "metrics": list(rows.values())}
    path = Path(folder) / FILE_NAME
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def read_results(path: Path) -> Results:
    """Read a ``results.json``."""
    with third_party(f"{path}: not a valid results file"):
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA}, got {document['schema']!r}")
        metrics = [Metric(**row) for row in document["metrics"]]
        return Results(document["command"], document["fingerprint"], metrics)


def print_results(
    path: Path, console: Console | None = None, *, headings: Mapping[Stage | None, str] | None = None
) -> None:
    """Print the metrics of a ``results.json`` with their intervals, starting with before and after, side by side.

    ``headings`` overrides the column headings of stages.
    """
    results = read_results(path)
    column_names: dict[Stage | None, str] = {**_HEADINGS, **(headings or {})}
    console = console or Console()
    title: str | None = f"simpo {results.command}"
    stages: tuple[Stage | None, ...]
    for stages in (("before", "after"), (None,)):
        if metrics := [metric for metric in results.metrics if metric.stage in stages]:
            print_full_width(console, _table(metrics, stages, column_names, title))
            title = None


def make_table(
    headings: Iterable[str], rows: Iterable[Iterable[str]], *, names: int, title: str | None, caption: str = ""
) -> Table:
    """Build a table with ``names`` left-aligned columns of names, followed by right-aligned columns of numbers."""
    # Text objects, so that rich does not mistake the brackets of an interval for markup.
    table = Table(title=Text(title) if title else None, caption=Text(caption) if caption else None, box=SIMPLE_HEAD)
    for place, heading in enumerate(headings):
        table.add_column(Text(heading), justify="left" if place < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_full_width(console: Console, table: Table) -> None:
    """Print a table at its full width, even beyond the terminal's: a cropped number is a wrong number."""
    before = console.width
    console.width = _MAX_WIDTH
    console.width = max(before, Measurement.get(console, console.options, table).maximum)
    console.print(table)
    console.width = before


def _table(
    metrics: Sequence[Metric], stages: Sequence[Stage | None], headings: Mapping[Stage | None, str], title: str | None
) -> Table:
    rows: dict[str, dict[Stage | None, Metric]] = {}
    for metric in metrics:
        rows.setdefault(metric.name, {})[metric.stage] = metric
    # Numbers of items, merged if the stages agree: "500" or "500 / 480".
    counts = {
        name: " / ".join(dict.fromkeys(str(cell.n) for cell in cells.values() if cell.n is not None))
        for name, cells in rows.items()
    }
    shared = set(counts.values()) if len(set(counts.values())) == 1 else set()  # goes into the caption, not a column
    methods = sorted({metric.method for metric in metrics if metric.method})
    notes = [f"methods: {'; '.join(methods)}"] if methods else []
    notes += [f"n = {n}" for n in shared if n]
    columns = ["metric", *(headings[stage] for stage in stages), *([] if shared else ["n"])]
    lines = [
        [name, *(cells[stage].text if stage in cells else "" for stage in stages), *([] if shared else [counts[name]])]
        for name, cells in rows.items()
    ]
    return make_table(columns, lines, names=1, title=title, caption="; ".join(notes))
