"""The terminal of a command: text and progress on it, and Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from simpo.errors import InterruptedRun

Advance = Callable[[int], None]

_LINES = 10  # progress lines, where there is no terminal for a bar
# Control characters except line breaks, and those that change the direction of the text that follows.
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text with its control characters escaped, so that data and models cannot control the terminal."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def output_is_closed() -> bool:
    """Whether nobody reads standard output any longer, as after ``| head``; it then leads nowhere."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)  # so that nothing fails when the interpreter flushes
    os.close(nowhere)
    return True


@contextmanager
def progress(what: str, total: int, done: int, log: Callable[[str], None]) -> Iterator[Advance]:
    """Show the progress of the body: a bar on a terminal, otherwise a line for every tenth.

    ``done`` items were done before and do not count for the speed. ``log`` gets the lines where standard error is not a
    terminal. Yields a function to call with the number of items done since its last call.
    """
    # Imported here, because the commands that only need printable() should start quickly.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    start, current = time.monotonic(), done

    def advance(count: int) -> None:
        nonlocal current
        before, current = current, current + count
        if current * _LINES // total > before * _LINES // total:
            seconds_each = (time.monotonic() - start) / (current - done)
            left = f", about {duration(seconds_each * (total - current))} left" if current < total else ""
            log(f"{current:,} of {total:,} {what}{left}")

    yield advance


def duration(seconds: float) -> str:
    """A time span in its two largest units: ``2 h 5 min``, ``3 min 20 s``, ``7 s``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


# ---- Signals: stop a command in one line, or note the signal and stop later.


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the body at once, for a command that stores its work piece by piece.

    The error is :class:`InterruptedRun`, with exit code 130 or 143.
    """
    received = signal.SIGINT

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal received
        received = signal.SIGTERM
        raise KeyboardInterrupt  # not an Exception, so no library mistakes it for an error of its own

    try:
        with _handlers((signal.SIGTERM,), interrupt):
            yield
    except KeyboardInterrupt:
        raise InterruptedRun("interrupted; the same command continues", received) from None


@contextmanager
def record_signals(*signums: int) -> Iterator[list[int]]:
    """Add the first of these signals to the list instead of acting on it; a second one acts as it did before."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    with _handlers(signums, note) as restore:
        yield received


@contextmanager
def _handlers(signums: tuple[int, ...], handler: Any) -> Iterator[Callable[[], None]]:
    """Set the handler, except in threads (Python forbids it) and for ignored signals (``nohup``).

    Yields:
        A function that restores the earlier handlers before the end of the body.
    """
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        for signum in signums:
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, handler)
    try:
        yield restore
    finally:
        restore()
