"""Ctrl-C and SIGTERM in a command that stores its work piece by piece: both end it in one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from simpo.errors import InterruptedRun


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM break off the body at once.

    Args:
        message: one line: what is kept, and how to go on.

    Raises:
        InterruptedRun: one of them came; its exit code is 130 or 143.
    """
    came = [signal.SIGINT]

    def note(signum: int, frame: FrameType | None) -> NoReturn:
        came.append(signal.SIGTERM)
        raise KeyboardInterrupt  # which no library takes for an error of its own

    before = _handle_sigterm(note)
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRun(message, came[-1]) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _handle_sigterm(handler: Any) -> Any:
    """Set the handler and return the one before; None, and nothing is set, where it may not or must not be."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        return None
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        return None
    return signal.signal(signal.SIGTERM, handler)
