"""``results.json``: the metrics of a command, written once and printed from the file."""

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
# Files of held-out rows under the start model and under the trained one: all rows' scores, and some rows as text.
HELD_OUT: dict[Stage, str] = {"before": "held_out_before.jsonl", "after": "held_out_after.jsonl"}
EXAMPLES: dict[Stage, str] = {"before": "examples_before.jsonl", "after": "examples_after.jsonl"}

_WIDEST = 1000  # columns of text
# Column headings in their order; None is the stage of a metric that has none.
_HEADINGS: dict[Stage | None, str] = {None: "value", "before": "before", "after": "after"}


@dataclass(frozen=True)
class Metric:
    """One measured number; the fields are the keys of ``results.json``."""

    name: str  # what was measured, e.g. `eval_rewards/accuracies`
    value: float | None  # the number; None where it is not finite
    stage: Stage | None = None  # before or after training; None where that does not apply
    n: int | None = None  # number of items that it was measured on
    low: float | None = None  # lower bound of its interval
    high: float | None = None  # upper bound of its interval
    method: str | None = None  # how the interval was computed

    @classmethod
    def of(cls, name: str, found: Interval | None, stage: Stage | None = None, *, method: str | None = None) -> Metric:
        """A metric with an interval, whose description ``method`` replaces; without a value where ``found`` is None."""
        if found is None:
            return cls(name, None, stage)
        return cls(name, found.value, stage, found.n, found.low, found.high, method or found.method)

    @property
    def text(self) -> str:
        """The value with its interval: ``0.6125 [0.584, 0.64]``; ``-`` for no value."""
        text = "-"
        if self.value is not None:
            text = f"{self.value:,.0f}" if abs(self.value) >= 10_000 else f"{self.value:.4g}"
        return text if self.low is None or self.high is None else f"{text} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def interval(self) -> Interval:
        """The value with its interval, of a metric that has a value."""
        assert self.value is not None
        return Interval(self.value, self.low, self.high, self.n or 0, self.method or "")


@dataclass(frozen=True)
class Results:
    """The contents of a ``results.json``."""

    command: str
    fingerprint: str
    metrics: list[Metric]


def fingerprint(*parts: Any) -> str:
    """SHA-256 (64 hex digits) of what determines a result: JSON values, mappings in any order.

    Raises:
        TypeError: a part has no canonical form (only JSON values have: no paths, no objects).
        ValueError: a part holds NaN or an infinity.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_results(folder: Path, *, command: str, fingerprint: str, metrics: Sequence[Metric]) -> Path:
    """Write ``folder/results.json`` and return its path; the file is whole or, after a crash, the old one.

    JSON has no NaN and no infinities: such a value or bound is stored as null, so that a run that diverged
    still has its other metrics.

    Raises:
        ValueError: two metrics have the same name and stage.
        SimpoError: the folder cannot be written to.
    """
    rows: dict[tuple[str, Stage | None], dict[str, Any]] = {}
    for metric in metrics:
        key = metric.name, metric.stage
        if key in rows:
            raise ValueError(f"the metric {metric.name} ({_HEADINGS[metric.stage]}) occurs twice")
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
    with third_party(f"{path}: cannot be read as a file of results"):
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA}, got {document['schema']!r}")
        metrics = [Metric(**row) for row in document["metrics"]]
        return Results(document["command"], document["fingerprint"], metrics)


def print_results(
    path: Path, console: Console | None = None, *, headings: Mapping[Stage | None, str] | None = None
) -> None:
    """Print the metrics of a ``results.json`` with their intervals: first those with stages, side by side.

    ``headings`` name the columns of the stages.
    """
    results = read_results(path)
    names: dict[Stage | None, str] = {**_HEADINGS, **(headings or {})}
    console = console or Console()
    title: str | None = f"simpo {results.command}"
    stages: tuple[Stage | None, ...]
    for stages in (("before", "after"), (None,)):
        if metrics := [metric for metric in results.metrics if metric.stage in stages]:
            print_full_width(console, _table(metrics, stages, names, title))
            title = None


def table_of(
    headings: Iterable[str], rows: Iterable[Iterable[str]], *, names: int, title: str | None, caption: str = ""
) -> Table:
    """A table whose first ``names`` columns are names, and the others numbers."""
    # Text throughout, so that rich does not take the brackets of an interval or a name for its markup.
    table = Table(title=Text(title) if title else None, caption=Text(caption) if caption else None, box=SIMPLE_HEAD)
    for place, heading in enumerate(headings):
        table.add_column(Text(heading), justify="left" if place < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_full_width(console: Console, table: Table) -> None:
    """Print a table at its full width: a number that is cropped is a wrong one."""
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
    # The number of items, once where the stages agree: "500" or "500 / 480".
    counts = {
        name: " / ".join(dict.fromkeys(str(cell.n) for cell in cells.values() if cell.n is not None))
        for name, cells in rows.items()
    }
    shared = set(counts.values()) if len(set(counts.values())) == 1 else set()  # these need no column
    methods = sorted({metric.method for metric in metrics if metric.method})
    notes = [f"methods: {'; '.join(methods)}"] if methods else []
    notes += [f"n = {n}" for n in shared if n]
    columns = ["metric", *(headings[stage] for stage in stages), *([] if shared else ["n"])]
    lines = [
        [name, *(cells[stage].text if stage in cells else "" for stage in stages), *([] if shared else [counts[name]])]
        for name, cells in rows.items()
    ]
    return table_of(columns, lines, names=1, title=title, caption="; ".join(notes))
