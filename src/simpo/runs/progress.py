"""How far a long command has come: a bar on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]

_LINES = 10


@contextmanager
def progress(what: str, total: int, done: int, log: Callable[[str], None]) -> Iterator[Advance]:
    """Report progress while the body runs.

    Args:
        what: of what there are ``total``.
        total: in all.
        done: there already, and no measure of the speed.
        log: called with the lines where standard error is no terminal.

    Yields:
        A function to call with the number of those that were done since its last call.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total, done, log).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


class _Lines:
    def __init__(self, what: str, total: int, done: int, log: Callable[[str], None]) -> None:
        self._what, self._total, self._done, self._log = what, total, done, log
        self._before = self._said = done
        self._start = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if self._done * _LINES // self._total > self._said * _LINES // self._total:
            self._said = self._done
            speed = (time.monotonic() - self._start) / (self._done - self._before)
            left = f", about {duration(speed * (self._total - self._done))} left" if self._done < self._total else ""
            self._log(f"{self._done:,} of {self._total:,} {self._what}{left}")


def duration(seconds: float) -> str:
    """A time span in its two largest units: ``2 h 5 min``, ``3 min 20 s``, ``7 s``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
