"""The argument parser of commands that do not use ``parse_settings`` yet."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from simpo.errors import SimpoError

_MODELS = ("model", "adapter", "a", "b")  # arguments that name a model by their position


_OPTIONS = ("--model", "--model_name_or_path")


_DATA = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".gz", ".zst")


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
        place = next(
            (action.metavar or action.dest.upper() for action in self._actions if not action.option_strings), ""
        )
        named = any(word.partition("=")[0] in _OPTIONS for word in words)
        if place == "MODEL" and not named and words and words[0].endswith(_DATA):
            self.error(f"argument MODEL: {words[0]} is a file of data, and the model comes first, or as --model MODEL")
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
            self.error(f"argument --model: this command takes {expected}, not {len(models)}")
        return models + rest

    def add_remote_code(self) -> None:
        """Add the permission to run code that comes with a model, which is off by default."""
        self.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")

    def error(self, message: str) -> NoReturn:
        """Raise :class:`SimpoError` with argparse's message."""
        raise SimpoError(f"{message}; {self.prog} --help lists the options")


def mapping(text: str) -> dict[str, Any]:
    """The value of an option that is a JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as \'{{"name": "value"}}\'')
    return found
