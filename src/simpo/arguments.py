"""An argument parser for commands with a few options of their own; recipes have :mod:`simpo.recipe`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from simpo.errors import SimpoError


class ArgumentParser(argparse.ArgumentParser):
    """Ends a mistake in one line instead of a usage screen, and takes no abbreviated options."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"simpo {command}", description=description, allow_abbrev=False)

    def add_remote_code(self) -> None:
        """Add the permission to run code that comes with a model, which is off by default."""
        self.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")

    def error(self, message: str) -> NoReturn:
        """Raise :class:`SimpoError` with argparse's message."""
        raise SimpoError(f"{message}; {self.prog} --help lists the options")
