"""The exceptions that the command line ends in one line instead of a traceback."""

from __future__ import annotations

import signal
from collections.abc import Callable


class SimpoError(ValueError):
    """A mistake in what the user gave: data, recipe, model or folder.

    The message is one line that says what was wrong, where (``file:line`` or the key) and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class CombinedError(SimpoError):
    """Mistakes that were found together, so that they can be corrected together; a single one reads as usual."""

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        listed = "; ".join(f"({number}) {mistake}" for number, mistake in enumerate(self.args, 1))
        return f"{len(self.args)} things to change: {listed}"


def check_all(*checks: Callable[[], object]) -> None:
    """Run all checks, and raise what is wrong with any of them together, as a :class:`CombinedError`."""
    mistakes: list[str] = []
    for check in checks:
        try:
            check()
        except CombinedError as error:
            mistakes += error.args
        except (ValueError, ImportError) as error:  # the latter: a key that needs a package
            mistakes.append(" ".join(str(error).split()))
    if mistakes:
        raise CombinedError(*dict.fromkeys(mistakes))


class InterruptedRun(Exception):  # noqa: N818 - nothing went wrong
    """A run was asked by a signal to stop; what it had done is saved.

    Attributes:
        exit_code: 128 and the signal's number, as shells have it: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
