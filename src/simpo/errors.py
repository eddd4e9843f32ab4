"""The exceptions that the command line reports in one line instead of a traceback."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SimpoError(ValueError):
    """A mistake in what the user gave: data, recipe, model or folder.

    The message is one line that says what was wrong, where (``file:line`` or the key) and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class CombinedError(SimpoError):
    """Mistakes that are reported together, so that they can be corrected together; a single one reads as usual."""

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        listed = "; ".join(f"({number}) {mistake}" for number, mistake in enumerate(self.args, 1))
        return f"{len(self.args)} things to change: {listed}"


def check_all(*checks: Callable[[], object]) -> None:
    """Run all checks, and raise the mistakes of all of them together as a :class:`CombinedError`."""
    mistakes: list[str] = []
    for check in checks:
        try:
            check()
        except CombinedError as error:
            mistakes += error.args
        except (ValueError, ImportError) as error:  # the latter: a key that needs a package
            mistakes.append(one_line(error, None))
    if mistakes:
        raise CombinedError(*dict.fromkeys(mistakes))


def one_line(error: BaseException, longest: int | None = 300) -> str:
    """The message of another library's exception on one line, at most ``longest`` characters of it."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


@contextmanager
def third_party(place: str) -> Iterator[None]:
    """Report whatever another library raises in the body as a mistake at ``place``: a file, a row or a key.

    Libraries that read files or evaluate text raise anything for damaged input, and the panics of those written in
    Rust are not even exceptions. Our own code does not belong in the body, because its bugs should keep their
    tracebacks.
    """
    try:
        yield
    except (SimpoError, InterruptedRun):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = one_line(error)
            if isinstance(error, OSError) and error.strerror and str(error.filename) in place:
                reason = error.strerror  # without the name of the file a second time
            raise SimpoError(f"{place}: {reason}") from error
        raise


class InterruptedRun(Exception):  # noqa: N818 - nothing went wrong
    """A signal stopped a run; what it had done is saved.

    Attributes:
        exit_code: 128 plus the signal's number, as in shells: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
