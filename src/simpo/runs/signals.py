"""Ctrl-C and SIGTERM: stop a command in one line, or note the signal and stop later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from simpo.errors import InterruptedRun


@contextmanager
def interruptible(message: str = "interrupted; the same command continues") -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the body at once, for a command that stores its work piece by piece.

    The error, :class:`InterruptedRun`, has exit code 130 or 143 and the ``message``, which says what is kept and how to
    continue.
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
        raise InterruptedRun(message, received) from None


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
