"""Measurements in a JSON file, each made once, so that a benchmark that was stopped continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from simpo.runs.files import write_text
from simpo.statistics import Interval


class Figures:
    """The measurements in ``path``, by a name for each; the folder is made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What is known by this name, or what ``measure`` returns, which is kept."""
        if name not in self._known:
            self._known[name] = measure()
            write_text(self._path, json.dumps(self._known, indent=1) + "\n")
        return self._known[name]


def in_words(found: Interval) -> str:
    """The value with its interval, if there is one."""
    return f"{found.value:.3f}" + ("" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]")
