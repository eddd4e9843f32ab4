"""``log.txt``: what a command said and what libraries warned of, with the time."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path

from simpo.atomic import disk_errors
from simpo.runs.redaction import masked


def now() -> str:
    """The time in UTC, to the second: ``2026-01-31T12:00:00+00:00``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class LogFile(logging.Handler):
    """Appends lines to a file, and whatever loggers let through while it is a handler of one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("note: %(message)s"))
        self.path = path

    def write(self, line: str) -> None:
        """Append a line, without access tokens.

        Raises:
            SimpoError: the file cannot be written.
        """
        with disk_errors(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{now()} {masked(line)}\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record; a library's message does not end the run because it cannot be kept."""
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)
