"""Measurements stored in a JSON file, so that an interrupted benchmark can continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from simpo.runs.files import write_text
from simpo.statistics import Interval


class MeasurementCache:
    """Named measurements stored in the JSON file ``path``; its folder is created if needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def get_or_measure(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the stored measurement called ``name``; if there is none, call ``measure`` and store its result."""
        if name not in self._known:
            self._known[name] = measure()
            write_text(self._path, json.dumps(self._known, indent=1) + "\n")
        return self._known[name]


def format_interval(mean: Interval) -> str:
    """Format a value with its interval, if it has one."""
    return f"{mean.value:.3f}" + ("" if mean.low is None else f" [{mean.low:.3f}, {mean.high:.3f}]")
