"""An argument parser for commands with a few options of their own; recipes have :mod:`simpo.recipe`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from simpo.coercion import coerce
from simpo.errors import SimpoError


class ArgumentParser(argparse.ArgumentParser):
    """Ends a mistake in one line instead of a usage screen, and takes no abbreviated options."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"simpo {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise :class:`SimpoError` with argparse's message."""
        raise SimpoError(f"{message}; {self.prog} --help lists the options")


def mapping(text: str) -> dict[str, str]:
    """The value of an option that is a JSON mapping of names to names."""
    try:
        return coerce(text, dict[str, str])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{error}; write it as JSON, e.g. \'{{"question": "prompt"}}\'') from error
