"""The settings of a command line."""

from __future__ import annotations

from typing import Any

from simpo.errors import SimpoError
from simpo.recipe.setting import Setting


def read_command_line(arguments: list[str]) -> list[Setting]:
    """``--key value ...`` and ``--key=value``, in their order; raises :class:`SimpoError` at a value without a key."""
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            values = given.setdefault(name.replace("-", "_"), [])
            if equals:
                values.append(value)
        elif values is None:
            raise SimpoError(f"{argument}: expected [RECIPE.yaml] [--key value ...]")
        else:
            values.append(argument)
    return [Setting(key, _option_value(values), None, f"--{key}") for key, values in given.items()]


def _option_value(values: list[str]) -> Any:
    if not values:
        return True
    plain = [None if value == "null" else value for value in values]
    return plain[0] if len(plain) == 1 else plain
