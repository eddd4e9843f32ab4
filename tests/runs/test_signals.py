"""Signals end a command with one line, and leave everything else as it was."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from simpo.errors import InterruptedRun
from simpo.runs.terminal import interruptible


def signalled(signum: signal.Signals) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(5)  # the signal arrives before this returns


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_body_and_is_named(signum, code) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRun, match="to continue") as stop, interruptible():
        signalled(signum)
    assert stop.value.exit_code == code
    assert signal.getsignal(signal.SIGTERM) == before


def test_libraries_that_catch_every_error_do_not_catch_a_signal() -> None:
    with pytest.raises(InterruptedRun), interruptible():
        try:
            signalled(signal.SIGTERM)
        except Exception:
            pytest.fail("a signal is no error of the body's")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_set_no_handlers() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]
