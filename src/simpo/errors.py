"""The exceptions that the command line ends in one line instead of a traceback."""

from __future__ import annotations

import signal


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


class InterruptedRun(Exception):  # noqa: N818 - nothing went wrong
    """A run was asked by a signal to stop; what it had done is saved.

    Attributes:
        exit_code: 128 and the signal's number, as shells have it: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
