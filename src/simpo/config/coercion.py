"""Text to typed values: what a dataclass field accepts, and the options of commands without a recipe."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from simpo.errors import SimpoError


def nearest(word: str, words: Iterable[str], meaning: Mapping[str, str] | None = None) -> str:
    """``"; did you mean ...?"`` with the one of ``words`` most like ``word``, or its ``meaning``; empty if none is."""
    close = difflib.get_close_matches(word, sorted(words), n=1)
    return f"; did you mean {(meaning or {}).get(close[0], close[0])}?" if close else ""


def coerce(value: Any, annotation: Any) -> Any:
    """Fit a plain value to an annotation: of a union's members, to the strictest that takes it.

    Args:
        value: text, None, True, a list of these or a mapping, as a recipe or the command line gives them.
        annotation: what the field takes.

    Raises:
        ValueError: no member of ``annotation`` takes it; says what would fit.
    """
    members = _members(annotation)
    if annotation is Any or (value is None and type(None) in members):
        return value
    value = _decoded(value, {get_origin(member) or member for member in members})
    for member in sorted(members, key=_looseness):
        with suppress(ValueError):
            return _read(value, member)
    shown = "null" if value is None else reprlib.repr(value)
    hint = "".join(nearest(str(value), map(str, _choices(member))) for member in members if _choices(member))
    remedy = "; leave the key out for its default" if value is None else hint
    raise ValueError(f"{shown} is not {describe(annotation)}{remedy}")


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    members = get_args(annotation)
    # transformers writes `IntervalStrategy | str`, where the text is only a spelling of the enumeration.
    enumerated = any(_is_enum(member) for member in members)
    return tuple(member for member in members if not (enumerated and member is str))


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _choices(kind: Any) -> list[Any]:
    if _is_enum(kind):
        return [member.value for member in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _decoded(value: Any, kinds: set[Any]) -> Any:
    """Text that is a JSON list or mapping as that, where such a one fits."""
    brackets = {"[": list, "{": dict}
    if isinstance(value, str) and brackets.get(value[:1]) in kinds:
        with suppress(ValueError):
            return json.loads(value)
    return value


# From strict to loose: text takes whatever is text, so it comes after what text may spell.
_ORDER = (bool, int, float, dict, str, list)


def _looseness(kind: Any) -> int:
    origin = get_origin(kind) or kind
    return _ORDER.index(origin) if origin in _ORDER else -1


def _read(value: Any, kind: Any) -> Any:
    if choices := _choices(kind):
        choice = _read_choice(value, choices)
        return kind(choice) if _is_enum(kind) else choice
    reader = _READERS.get(get_origin(kind) or kind)
    if reader is None:
        raise ValueError(f"a recipe cannot give {describe(kind)}")
    return reader(value, *get_args(kind))


def _read_choice(value: Any, choices: Iterable[Any]) -> Any:
    for choice in choices:
        with suppress(ValueError):
            if coerce(value, type(choice)) == choice:
                return choice
    raise ValueError("not a choice")


_TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    raise ValueError("neither true nor false")


def _read_int(value: Any) -> int:
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)  # exact, where a float would round
    number = _read_float(value)
    if not number.is_integer():
        raise ValueError("not whole")
    return int(number)


def _read_float(value: Any) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        number = float(value)
        if not math.isnan(number):
            return number
    raise ValueError("not a number")


def _read_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError("not text")


def _read_list(value: Any, item: Any = Any) -> list[Any]:
    if isinstance(value, list | str):
        return [coerce(element, item) for element in ([value] if isinstance(value, str) else value)]
    raise ValueError("not a list")


def _read_dict(value: Any, key: Any = Any, item: Any = Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return {coerce(name, key): coerce(element, item) for name, element in value.items()}
    raise ValueError("not a mapping")


_READERS: dict[Any, Callable[..., Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    list: _read_list,
    dict: _read_dict,
}


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def describe(annotation: Any) -> str:
    """Describe the accepted values, to complete the sentence "'abc' is not ..."."""
    return " or ".join(_describe_one(member) for member in _members(annotation) if member is not type(None))


def _describe_one(kind: Any) -> str:
    if choices := _choices(kind):
        return "one of " + ", ".join(map(str, choices))
    origin = get_origin(kind) or kind
    word = _WORDS.get(origin, getattr(origin, "__name__", str(origin)))
    content = get_args(kind)[-1:]
    if not content or content[0] is Any:
        return word
    return f"{word}, each {'item' if origin is list else 'value'} {describe(content[0])}"


# ---- An argument parser for commands with a few options of their own; recipes have :mod:`simpo.config`.


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
