"""Text from a recipe or the command line to typed values, by annotation."""

from __future__ import annotations

import collections.abc
import difflib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

# In text: what no path can hold, and half of a surrogate pair, which Python reads names that are not UTF-8 as.
_UNFIT = re.compile("[\0\ud800-\udfff]")
_TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list",
    dict: "a mapping",
}
# The strictest member of a union that accepts a value is used; text accepts almost everything, so it comes late.
_STRICTNESS = (Literal, bool, int, float, dict, tuple, str, Path, list)
_ABSTRACT: dict[Any, Any] = {collections.abc.Mapping: dict, collections.abc.Sequence: list}


def nearest(name: str, known: Iterable[str], meaning: Mapping[str, str] | None = None) -> str:
    """``"; did you mean ...?"`` with the most similar ``known`` name, or its ``meaning``; empty if none is similar."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {(meaning or {}).get(close[0], close[0])}?" if close else ""


def coerce(value: Any, annotation: Any) -> Any:
    """Convert a plain value to the strictest member of ``annotation`` that accepts it.

    ``value`` is text, None, True, a list of these or a mapping, as a recipe or the command line contains them.

    Raises:
        ValueError: no member accepts the value; the message describes what would fit.
    """
    members = members_of(annotation)
    if annotation is Any or (value is None and type(None) in members):
        return value
    brackets = {"[": (list, tuple), "{": (dict,)}
    if isinstance(value, str) and any(_origin(member) in brackets.get(value[:1], ()) for member in members):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    for member in sorted(members, key=lambda member: (*_STRICTNESS, _origin(member)).index(_origin(member))):
        with suppress(ValueError):
            return _convert(value, member)
    shown = "null" if value is None else reprlib.repr(value)
    remedy = "".join(nearest(str(value), map(str, choices_of(member))) for member in members if choices_of(member))
    if value is None:
        remedy = "; leave the key out for its default"
    raise ValueError(f"{shown} is not {describe(annotation)}{remedy}")


def describe(annotation: Any) -> str:
    """Describe the accepted values, to complete the sentence "'abc' is not ..."."""
    return " or ".join(_describe_member(member) for member in members_of(annotation) if member is not type(None))


def choices_of(kind: Any) -> list[Any]:
    """The values of an enumeration or a ``Literal``; empty for any other type."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def accepts(annotation: Any, *kinds: type) -> bool:
    """Whether a member of the annotation is one of these plain types or containers."""
    return any(_origin(member) in kinds for member in members_of(annotation))


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    members = get_args(annotation)
    # transformers writes `IntervalStrategy | str`, where the text is only a spelling of the enumeration.
    enumerated = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    return tuple(member for member in members if not (enumerated and member is str))


def _origin(kind: Any) -> Any:
    """The plain type of a type: ``list`` of ``list[int]``, ``dict`` of ``Mapping``, ``Literal`` of any choices."""
    if choices_of(kind):
        return Literal
    origin = get_origin(kind) or kind
    return _ABSTRACT.get(origin, origin)


def _convert(value: Any, kind: Any) -> Any:
    """Convert to one type that is not a union; ValueError, whose text is not shown, if the value does not fit."""
    for choice in choices_of(kind):
        if value is False and choice in ("no", "off"):  # as which YAML 1.1 reads these words
            return kind(choice) if isinstance(kind, type) else choice
        with suppress(ValueError):
            if coerce(value, type(choice)) == choice:
                return kind(choice) if isinstance(kind, type) else choice
    origin, parts = _origin(kind), get_args(kind)
    if origin is Literal:
        raise ValueError
    if origin is list and isinstance(value, list | str):
        return [coerce(item, parts[0] if parts else Any) for item in ([value] if isinstance(value, str) else value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(parts):
        return tuple(coerce(item, part) for item, part in zip(value, parts, strict=True))
    if origin is dict and isinstance(value, dict):
        key_type, item_type = parts or (Any, Any)
        return {coerce(key, key_type): coerce(item, item_type) for key, item in value.items()}
    return _convert_scalar(value, origin)


def _convert_scalar(value: Any, kind: Any) -> Any:
    if kind is bool:
        if isinstance(value, str) and value.lower() in _TRUTH:
            return _TRUTH[value.lower()]
        if isinstance(value, bool):
            return value
    elif kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        return _convert_number(value, kind)
    elif kind in (str, Path) and isinstance(value, str) and not _UNFIT.search(value):
        return value if kind is str else Path(os.path.expanduser(value))  # noqa: PTH111 - Path's own raises for ~nobody
    raise ValueError


def _convert_number(value: str | float, kind: type) -> int | float:
    if kind is int:
        with suppress(ValueError):
            return int(str(value))  # exact, where a float would round
    number = float(value)
    overflown = math.isinf(number) and any(character.isdigit() for character in str(value))  # such as 1e400
    if math.isnan(number) or overflown or (kind is int and not number.is_integer()):
        raise ValueError
    return kind(number)


def _describe_member(kind: Any) -> str:
    if choices := choices_of(kind):
        return "one of " + ", ".join(map(str, choices))
    origin, parts = _origin(kind), get_args(kind)
    if origin is tuple:
        return "a list of " + ", ".join(map(describe, parts))
    description = _DESCRIPTIONS.get(origin, getattr(origin, "__name__", str(origin)))
    if not parts or parts[-1] is Any:
        return description
    return f"{description}, each {'item' if origin is list else 'value'} {describe(parts[-1])}"
