"""Plain values to annotated ones: what a dataclass field takes, read from the text that a user wrote."""

from __future__ import annotations

import difflib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


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
    """What fits, in words: the end of "'abc' is not ..."."""
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
