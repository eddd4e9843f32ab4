"""An argument parser for commands with a few options of their own; recipes have :mod:`simpo.recipe`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from simpo.errors import SimpoError

_MODELS = ("model", "adapter", "a", "b")  # arguments that name a model by their position
_OPTIONS = ("--model", "--model_name_or_path")


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake in one line instead of a usage screen, and takes no abbreviated options.

    A model that a command takes by its position can also be given as ``--model`` or ``--model_name_or_path``.
    """

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"simpo {command}", description=description, allow_abbrev=False)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, after models given by an option have been put in their positions."""
        return super().parse_known_args(args if args is None else self._models_first(list(args)), namespace)

    def _models_first(self, words: list[str]) -> list[str]:
        expected = sum(action.dest in _MODELS and not action.option_strings for action in self._actions)
        models: list[str] = []
        rest: list[str] = []
        while words:
            option, equals, value = words.pop(0).partition("=")
            if option not in _OPTIONS or not expected:
                rest.append(option + equals + value)
            elif equals or words:
                models.append(value if equals else words.pop(0))
            else:
                self.error(f"argument {option}: expected one argument")
        if models and len(models) != expected:
            self.error(f"argument --model: given {len(models)} times, and this command takes {expected}")
        return models + rest

    def error(self, message: str) -> NoReturn:
        """Raise :class:`SimpoError` with argparse's message."""
        raise SimpoError(f"{message}; {self.prog} --help lists the options")
