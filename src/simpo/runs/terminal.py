"""Terminal output, progress bars, and the handling of Ctrl-C and SIGTERM."""

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

_LINES = 10  # progress lines logged when there is no terminal to show a bar on
# Control characters except line breaks, and characters that change the direction of the following text.
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escape the control characters in a text, so that data and models cannot control the terminal."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def output_is_closed() -> bool:
    """Whether the reader of standard output is gone, as after ``| head``; if so, redirect it to the null device."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, output)  # otherwise, flushing at interpreter exit would fail
    os.close(null_device)
    return True


@contextmanager
def progress(items: str, total: int, done: int, log: Callable[[str], None]) -> Iterator[Advance]:
    """Show the progress of the body: a bar if standard error is a terminal, otherwise ``log`` a line every 10%.

    ``items`` names what is counted. The first ``done`` of them were finished earlier and do not count toward the speed.
    Yields a function that takes the number of items finished since its last call.
    """
    # Imported here, so that commands that only need printable() start quickly.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(items, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    start, current = time.monotonic(), done

    def advance(count: int) -> None:
        nonlocal current
        before, current = current, current + count
        if current * _LINES // total > before * _LINES // total:
            seconds_each = (time.monotonic() - start) / (current - done)
            left = f", about {duration(seconds_each * (total - current))} left" if current < total else ""
            log(f"{current:,} of {total:,} {items}{left}")

    yield advance


def duration(seconds: float) -> str:
    """Format a time span in at most two units: ``2 h 5 min``, ``3 min 20 s``, ``7 s``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


# ---- Signals: stop at once with a one-line message, or record the signal and stop later.


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the body at once, for commands that store their work incrementally.

    Raises:
        InterruptedRun: the body was interrupted; the exit code is 130 or 143.
    """
    received = signal.SIGINT

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal received
        received = signal.SIGTERM
        raise KeyboardInterrupt  # not a subclass of Exception, so libraries do not swallow it

    try:
        with _handlers((signal.SIGTERM,), interrupt):
            yield
    except KeyboardInterrupt:
        raise InterruptedRun("interrupted; run the same command again to continue", received) from None


@contextmanager
def record_signals(*signums: int) -> Iterator[list[int]]:
    """Record the first of these signals in the yielded list instead of acting on it; a second one acts as usual."""
    received: list[int] = []

    def record(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    with _handlers(signums, record) as restore:
        yield received


@contextmanager
def _handlers(signums: tuple[int, ...], handler: Any) -> Iterator[Callable[[], None]]:
    """Install a signal handler for the body, except in threads (Python forbids it) and for ignored signals (``nohup``).

    Yields:
        A function that restores the previous handlers early.
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
