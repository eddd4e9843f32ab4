"""Settings as dataclass fields: declares them, converts and checks their values, and builds instances from these.

A setting is a dataclass field next to the code it configures. Its ``metadata`` may contain:

- ``help``: what the setting means, in one sentence.
- ``least``, ``above``, ``most``, ``below``: bounds of a number; None is always allowed.
- ``positional``: the placeholder shown in the help, such as ``MODEL``, if the value may be given without ``--key``.
- ``repeat``: True for a list whose option takes one value and may be repeated.

A command combines dataclasses by nesting them as fields of its own dataclass; their keys become keys of the command.
The default of such a field is an instance that holds the default of every key. Its ``metadata`` may contain:

- ``only``: the keys to include; all of them if absent.
- ``without``: keys to leave out.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import json
import math
import operator
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass
from enum import Enum
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from simpo.errors import CombinedError, SimpoError

# NUL, which no path can contain, and lone surrogates, which Python substitutes for bytes that are not UTF-8.
_INVALID_TEXT = re.compile("[\0\ud800-\udfff]")
_BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list",
    dict: "a mapping",
}
# The strictest member of a union that accepts a value wins; text accepts almost anything, so it comes late.
_STRICTNESS = (Literal, bool, int, float, dict, tuple, str, Path, list)
_ABSTRACT: dict[Any, Any] = {collections.abc.Mapping: dict, collections.abc.Sequence: list}


def nearest(name: str, known: Iterable[str], meaning: Mapping[str, str] | None = None) -> str:
    """Return ``"; did you mean ...?"`` with the closest ``known`` name (or its ``meaning``), or "" if none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {(meaning or {}).get(close[0], close[0])}?" if close else ""


def coerce(value: Any, annotation: Any) -> Any:
    """Convert a value from a recipe or the command line to the strictest member of ``annotation`` that accepts it.

    ``value`` is text, None, True, a list of these, or a mapping.

    Raises:
        ValueError: no member accepts the value; the message describes what would be accepted.
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
        remedy = "; leave out the key to use its default"
    raise ValueError(f"{shown} is not {describe(annotation)}{remedy}")


def describe(annotation: Any) -> str:
    """Describe the accepted values so that the text completes the sentence "'abc' is not ..."."""
    return " or ".join(_describe_member(member) for member in members_of(annotation) if member is not type(None))


def choices_of(kind: Any) -> list[Any]:
    """Return the values of an enumeration or a ``Literal``; an empty list for any other type."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def accepts(annotation: Any, *kinds: type) -> bool:
    """Whether any member of the annotation is one of these plain types or containers."""
    return any(_origin(member) in kinds for member in members_of(annotation))


def members_of(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    members = get_args(annotation)
    # In transformers' `IntervalStrategy | str`, the text is only another spelling of the enumeration.
    enumerated = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    return tuple(member for member in members if not (enumerated and member is str))


def _origin(kind: Any) -> Any:
    """Return the plain type: ``list`` for ``list[int]``, ``dict`` for ``Mapping``, ``Literal`` for any choices."""
    if choices_of(kind):
        return Literal
    origin = get_origin(kind) or kind
    return _ABSTRACT.get(origin, origin)


def _convert(value: Any, kind: Any) -> Any:
    """Convert to one type that is not a union; raise ValueError, whose text nobody sees, if the value does not fit."""
    for choice in choices_of(kind):
        if value is False and choice in ("no", "off"):  # YAML 1.1 reads these words as False
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
        if isinstance(value, str) and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        if isinstance(value, bool):
            return value
    elif kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        return _convert_number(value, kind)
    elif kind in (str, Path) and isinstance(value, str) and not _INVALID_TEXT.search(value):
        return value if kind is str else Path(os.path.expanduser(value))  # noqa: PTH111 - Path's own raises for ~nobody
    raise ValueError


def _convert_number(value: str | float, kind: type) -> int | float:
    if kind is int:
        with suppress(ValueError):
            return int(str(value))  # exact; a float would round large numbers
    number = float(value)
    overflowed = math.isinf(number) and any(character.isdigit() for character in str(value))  # such as 1e400
    if math.isnan(number) or overflowed or (kind is int and not number.is_integer()):
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


# ---- Dataclass fields.

_BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


class _Metadata(dict[str, Any]):
    """Field metadata. Copies hold only ``help``, because transformers' and TRL's parsers pass them to argparse."""

    def keys(self) -> Any:
        return self.copy().keys()

    def copy(self) -> dict[str, Any]:
        return {"help": self["help"]}


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a dataclass field as a setting with this default and help text."""
    metadata = _Metadata(metadata, help=help)
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, **metadata: Any) -> Any:
    """Declare a dataclass field as a setting with this help text and no default."""
    return dataclasses.field(metadata=_Metadata(metadata, help=help))


def check_values(settings: Any) -> None:
    """Check an instance's values against the bounds and choices that its fields declare.

    Raises:
        CombinedError: names every field whose value is not allowed.
    """
    hints = get_type_hints(type(settings))
    errors = []
    for declared in dataclasses.fields(settings):
        value = getattr(settings, declared.name)
        if value is not None and (error := _explain_invalid(value, hints[declared.name], declared.metadata)):
            errors.append(f"{declared.name}: {error}")
    if errors:
        raise CombinedError(*errors)


def _explain_invalid(value: Any, annotation: Any, metadata: Mapping[str, Any]) -> str | None:
    """Explain why a value is not allowed; None if it is, or if the field declares neither bounds nor choices."""
    bounds = {name: metadata[name] for name in _BOUNDS if name in metadata}
    if not bounds:
        choices = [choices_of(member) for member in members_of(annotation) if member is not type(None)]
        if not choices or not all(choices) or any(value in allowed for allowed in choices):
            return None
        return f"{value!r} is not one of {', '.join(map(str, chain(*choices)))}"
    whole = not accepts(annotation, float)
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return f"{value!r} is not {'a whole' if whole else 'a'} number"
    if not math.isfinite(value):
        return f"must be finite, not {value}"
    if all(_BOUNDS[name][1](value, bound) for name, bound in bounds.items()):
        return None
    return f"must be {' and '.join(f'{_BOUNDS[name][0]} {bound}' for name, bound in bounds.items())}, not {value}"


def setting_of(cls: Any, name: str) -> Any:
    """Declare the same setting as field ``name`` of another dataclass: same default, help text and bounds."""
    original: dataclasses.Field = cls.__dataclass_fields__[name]
    return dataclasses.field(default=original.default, metadata=original.metadata)


@dataclass(frozen=True)
class Setting:
    """The value given for a key."""

    key: str
    value: Any  # text, None, a list of these, or (from a file) a mapping; True for an option without a value
    place: str | None  # where it is in the file, e.g. `recipe.yaml:12`; None for the command line
    label: str  # place and key as written, which errors start with: `recipe.yaml:12: beta` or `--beta`


@dataclass(frozen=True)
class Key:
    """A setting, as its dataclass field declares it."""

    name: str  # field name, used in recipes and after `--`
    annotation: Any  # type that values are converted to
    default: Any  # `dataclasses.MISSING` if a value is required
    help: str  # empty if the field declares no help text
    positional: str  # placeholder in the help; empty for a key that can only be given as `--name`
    repeat: bool  # whether the option may be repeated
    owner: type  # the dataclass that declares the field


def keys_of(classes: Iterable[type]) -> dict[str, Key]:
    """Return the keys of dataclasses and those nested in them; the first declaration of a key wins."""
    keys: dict[str, Key] = {}
    for cls in classes:
        for key in _iterate_keys(cls, MISSING):
            keys.setdefault(key.name, key)
    return keys


def _iterate_keys(cls: type, defaults: Any) -> Iterator[Key]:
    for declared, kind, default in _settable_fields(cls, defaults):
        metadata = declared.metadata
        if dataclasses.is_dataclass(kind):
            yield from (key for key in _iterate_keys(kind, default) if _is_included(key.name, metadata))  # type: ignore[arg-type]
            continue
        # transformers annotates fsdp as text and uses argparse's `const` to declare that it may also be a flag.
        annotation = kind | bool if metadata.get("const") is True else kind
        if choices := tuple(metadata.get("choices", ())):  # transformers' way of declaring them
            annotation = Literal[choices] | None if type(None) in members_of(annotation) else Literal[choices]
        owner = next(base for base in cls.__mro__ if declared.name in inspect.get_annotations(base))
        help_text = " ".join(metadata.get("help", "").split())
        positional, repeat = metadata.get("positional", ""), metadata.get("repeat", False)
        yield Key(declared.name, annotation, default, help_text, positional, repeat, owner)


def _settable_fields(cls: type, defaults: Any) -> Iterator[tuple[dataclasses.Field, Any, Any]]:
    """Yield the fields that can be set, with their types and defaults; an instance ``defaults`` overrides these."""
    hints = get_type_hints(cls)
    for declared in dataclasses.fields(cls):
        if declared.init:
            default = declared.default if declared.default_factory is MISSING else declared.default_factory()
            default = default if defaults is MISSING else getattr(defaults, declared.name)
            yield declared, hints[declared.name], default


def _is_included(name: str, metadata: Mapping[str, Any]) -> bool:
    only = metadata.get("only")
    return (not only or name in only) and name not in metadata.get("without", ())


def convert_setting(setting: Setting, annotation: Any) -> Any:
    """Convert a setting's value to its field's type; raise :class:`SimpoError` if it does not fit."""
    try:
        return coerce(setting.value, annotation)
    except ValueError as error:
        problem = "needs a value" if setting.value is True else str(error)
        raise SimpoError(f"{setting.label}: {problem}") from error


def build(cls: type, values: Mapping[str, Any], settings: Mapping[str, Setting], defaults: Any = MISSING) -> Any:
    """Build an instance of ``cls`` from a mapping of keys to values.

    ``defaults``, an instance of ``cls``, provides whatever ``values`` lacks; ``settings`` are for locating errors.
    """
    arguments = {}
    mistakes: list[str] = []
    for declared, annotation, default in _settable_fields(cls, defaults):
        name = declared.name
        if dataclasses.is_dataclass(annotation):
            nested_values = {key: value for key, value in values.items() if _is_included(key, declared.metadata)}
            try:
                arguments[name] = build(annotation, nested_values, settings, default)  # type: ignore[arg-type]
            except SimpoError as error:
                mistakes += error.args
        elif name in values:
            arguments[name] = values[name]
        elif default is MISSING:
            mistakes.append(f"{name} is missing: give it in the recipe or as --{name}")
        elif defaults is not MISSING:
            arguments[name] = default
    if mistakes:
        raise CombinedError(*mistakes)
    try:
        return cls(**arguments)
    except CombinedError as error:
        raise CombinedError(*(_locate(mistake, settings) for mistake in error.args)) from error
    except (ValueError, ImportError) as error:  # ImportError: a key needs a package that is not installed
        raise SimpoError(_locate(str(error), settings)) from error


def _locate(message: str, settings: Mapping[str, Setting]) -> str:
    """Put a message on one line, prefixed with the place of the first setting it names if that is in the file."""
    named = (settings[name] for name in re.findall(r"\w+", message) if name in settings)
    first = next(named, None)
    text = " ".join(message.split())
    return text if first is None or first.place is None else f"{first.place}: {text}"


def check_installed(report_to: str | list[str] | None, label: str) -> None:
    """Raise :class:`SimpoError` if a requested experiment tracker is unknown or not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not names or names in (["all"], ["none"]):
        return
    from transformers import integrations  # noqa: PLC0415  (slow to import: it probes for every integration)

    available = set(integrations.get_available_reporting_integrations())
    if integrations.is_flytekit_available():  # the only one that get_available_reporting_integrations omits
        available.add("flyte")
    for name in names:
        if name not in integrations.INTEGRATION_TO_CALLBACK:
            hint = nearest(name, integrations.INTEGRATION_TO_CALLBACK)
            raise SimpoError(f"{label}: {name!r} is not a reporting integration of transformers{hint}")
    if missing := [name for name in names if name not in available]:
        verb, pronoun = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise SimpoError(
            f"{label}: {' and '.join(missing)} {verb} not installed; install {pronoun}, or set report_to: none"
        )
