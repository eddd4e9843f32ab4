"""Exceptions that the command line reports in one line instead of a traceback."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SimpoError(ValueError):
    """A mistake in the user's input: data, recipe, model or folder.

    The message is one line that names what is wrong, where (``file:line`` or the key) and what to do about it.
    The command line prints it without a traceback and exits with code 2.
    """


class CombinedError(SimpoError):
    """Several mistakes reported at once, so that they can be fixed in one go; a single one reads like any other."""

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        listed = "; ".join(f"({number}) {mistake}" for number, mistake in enumerate(self.args, 1))
        return f"{len(self.args)} problems: {listed}"


def check_all(*checks: Callable[[], object]) -> None:
    """Run all checks, then raise every mistake they found as one :class:`CombinedError`."""
    mistakes: list[str] = []
    for check in checks:
        try:
            check()
        except CombinedError as error:
            mistakes += error.args
        except (ValueError, ImportError) as error:  # ImportError: a key needs a package that is not installed
            mistakes.append(one_line(error, None))
    if mistakes:
        raise CombinedError(*dict.fromkeys(mistakes))


def one_line(error: BaseException, max_length: int | None = 300) -> str:
    """Return another library's error message on one line, truncated to ``max_length`` characters.

    Errors that Python itself raises for unexpected content, such as ``KeyError: 'weight_map'``, keep their name,
    because nobody would recognize the message alone as an error.
    """
    message = " ".join(str(error).split())
    if isinstance(error, AttributeError | LookupError | TypeError) and message:
        message = f"{type(error).__name__}: {message}"
    return message[:max_length] or type(error).__name__


@contextmanager
def third_party(place: str) -> Iterator[None]:
    """Re-raise whatever another library raises in the body as a :class:`SimpoError` at ``place`` (a file, row or key).

    Libraries that read files or evaluate text raise anything on damaged input; panics of Rust libraries are not even
    an ``Exception``. Keep our own code out of the body, so that its bugs keep their tracebacks.
    """
    try:
        yield
    except (SimpoError, InterruptedRun):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = one_line(error)
            if isinstance(error, OSError) and error.strerror and str(error.filename) in place:
                reason = error.strerror  # `place` already names the file
            raise SimpoError(f"{place}: {reason}") from error
        raise


class InterruptedRun(Exception):  # noqa: N818 - nothing went wrong
    """Raised when a signal stops a run, after its progress has been saved.

    Attributes:
        exit_code: 128 plus the signal number, as in shells: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
