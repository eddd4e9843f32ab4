"""The property every input must have: a result or a one-line error with exit code 2, never a traceback or a hang.

``make fuzz`` sets ``SIMPO_FUZZ``, which multiplies the number of new examples each test specifies for a campaign.
Without it, a test runs a few fixed examples, as in CI.
"""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from simpo import SimpoError
from simpo.cli import main

CAMPAIGN = float(os.environ.get("SIMPO_FUZZ", "0"))
START = int(os.environ.get("SIMPO_FUZZ_SEED", "0"))
_PART = 100  # examples per seed
_PATIENCE = 10  # seconds of CPU time for one example
_MEMORY = 1 << 30  # bytes by which one example may grow the process


def fuzz(
    fixed: int, campaign: int, **strategies: SearchStrategy
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with ``fixed`` draws from the strategies, or with ``campaign`` (times ``SIMPO_FUZZ``) new ones."""
    common: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        if not CAMPAIGN:
            few = settings(max_examples=fixed, derandomize=True, phases=[Phase.generate, Phase.shrink], **common)
            return few(given(**strategies)(test))

        def keep_trying(**fixtures: Any) -> None:
            failures: dict[str, Exception] = {}
            examples, number, slowest, begun = 0, START, 0.0, time.process_time()

            def one(**drawn: Any) -> None:
                nonlocal examples, slowest
                examples += 1
                before = time.process_time()
                try:
                    test(**fixtures, **drawn)
                except Exception as failure:  # keep the first of each kind and continue searching
                    if failures.setdefault(_kind(failure), failure) is failure:
                        failure.add_note(f"with {drawn!r:.3000}")
                        traceback.print_exception(failure)
                slowest = max(slowest, time.process_time() - before)

            while examples < campaign * CAMPAIGN:
                some = settings(max_examples=_PART, phases=[Phase.generate], **common)
                some(seed(number)(given(**strategies)(one)))()
                number += 1
                print(
                    f"{test.__name__}: {examples:,} examples, {len(failures)} kinds of failures, "
                    f"{time.process_time() - begun:.0f} s of processor time, {slowest:.1f} s the slowest",
                    flush=True,
                )
            if failures:
                raise ExceptionGroup(f"{len(failures)} kinds of failures", list(failures.values()))

        names = [name for name in test.__code__.co_varnames[: test.__code__.co_argcount] if name not in strategies]
        return _with_parameters(keep_trying, test.__name__, names)

    return decorate


def _kind(failure: Exception) -> str:
    """Return the last lines of a failure without numbers, paths and quoted values, so equal faults compare equal."""
    lines = [line for line in str(failure).splitlines() if line.strip() and "this is a bug" not in line]
    return re.sub(r"[\d,]+|/[^ ':]*|'[^']*'|\(.*\)", "", " ".join(lines[-3:]))[-200:]


def _with_parameters(function: Callable[..., None], name: str, names: Sequence[str]) -> Callable[..., None]:
    """Give ``function`` the parameters from which pytest requests fixtures."""
    namespace: dict[str, Any] = {"function": function}
    exec(f"def {name}({', '.join(names)}): function({', '.join(f'{n}={n}' for n in names)})", namespace)
    return namespace[name]


class Ended(NamedTuple):
    """The outcome of a command."""

    code: int
    output: str
    error: str


class _HangError(BaseException):
    """Too much CPU time. Not an Exception, so that no library handles it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if the body takes ten seconds of CPU time or a gigabyte of memory."""

    def stop(signum: int, frame: object) -> None:
        raise _HangError(f"more than {_PATIENCE} s")

    handler = signal.signal(signal.SIGPROF, stop)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, _PATIENCE)
    try:
        yield
    except _HangError as error:
        raise AssertionError("hangs") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert added < _MEMORY, f"{added:,} bytes of memory"


def end(*argv: object) -> Ended:
    """Run a ``simpo`` command in this process and check how it ends."""
    output, error = io.StringIO(), io.StringIO()
    stdin, sys.stdin = sys.stdin, io.StringIO("")
    try:
        with bounded(), redirect_stdout(output), redirect_stderr(error):
            try:
                code = main([str(argument) for argument in argv])
            except SystemExit as ended:  # from --help
                code = int(ended.code or 0)
    finally:
        sys.stdin = stdin
    found = Ended(code, output.getvalue(), error.getvalue())
    lines = found.error.splitlines()
    assert found.code in (0, 2), f"{argv}: exit code {found.code}\n{found.error}"
    if found.code == 2:
        assert lines and lines[-1].startswith("simpo: error: ") and len(lines) == 1, f"{argv}: {found.error}"
        assert len(lines[0]) < 5000, f"a line of {len(lines[0]):,} characters: {argv}"
    assert "Traceback" not in found.error + found.output
    return found


def accepted(call: Callable[[], Any]) -> Any:
    """Return a call's value or the :class:`SimpoError` it raised, whose message must be one line."""
    with bounded():
        try:
            return call()
        except SimpoError as error:
            assert "\n" not in str(error), str(error)
            return error
