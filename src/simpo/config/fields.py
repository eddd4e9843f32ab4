"""Dataclass fields as keys of a recipe: values and where they were given, types, required keys, help."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Any, get_type_hints

from simpo.config.coercion import coerce, describe, nearest
from simpo.errors import CombinedError, SimpoError

# ---- A value that somebody gave, in a file or on the command line, and where.


@dataclass(frozen=True)
class Setting:
    """A value that was given for a field.

    Attributes:
        key: the field.
        value: text, None, a list of these or, from the file, a mapping; True for an option without a value.
        place: where in the file it was given, ``recipe.yaml:12``; None for the command line.
        label: place and key as written, in front of what is wrong: ``recipe.yaml:12: beta`` or ``--beta``.
    """

    key: str
    value: Any
    place: str | None
    label: str


def annotations_of(classes: Iterable[type]) -> dict[str, Any]:
    """The type of every key of dataclasses, as values are fitted to it."""
    annotations = {}
    for cls in classes:
        hints = get_type_hints(cls)
        for field in fields_of(cls):
            # transformers annotates fsdp as text and says in argparse's words that it may be a flag as well.
            flag = field.metadata.get("const") is True
            annotations[field.name] = hints[field.name] | bool if flag else hints[field.name]
    return annotations


def fields_of(cls: type) -> list[dataclasses.Field]:
    """The fields of a dataclass that a recipe can set."""
    return [field for field in dataclasses.fields(cls) if field.init]


def fit(setting: Setting, annotation: Any) -> Any:
    """The setting's value as its field is annotated; raises :class:`SimpoError` where it does not fit."""
    try:
        return coerce(setting.value, annotation)
    except ValueError as error:
        problem = "a value is missing" if setting.value is True else str(error)
        raise SimpoError(f"{setting.label}: {problem}") from error


def check_installed(report_to: str | list[str] | None, label: str) -> None:
    """Raise :class:`SimpoError` if an experiment tracker was requested that is unknown or not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not names or names in (["all"], ["none"]):
        return
    from transformers import integrations  # noqa: PLC0415  (slow: it looks for every integration)

    available = set(integrations.get_available_reporting_integrations())
    if integrations.is_flytekit_available():  # the one that get_available_reporting_integrations leaves out
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


def build(cls: type, values: Mapping[str, Any], settings: Mapping[str, Setting]) -> Any:
    """An instance of ``cls`` with its own of ``values``; raises :class:`SimpoError` if one is missing or refused."""
    fields = fields_of(cls)
    for field in fields:
        if is_required(field) and field.name not in values:
            raise SimpoError(f"{field.name} is missing: give it in the recipe or as --{field.name}")
    try:
        return cls(**{field.name: values[field.name] for field in fields if field.name in values})
    except CombinedError as error:
        raise CombinedError(*(_located(mistake, settings) for mistake in error.args)) from error
    except (ValueError, ImportError) as error:  # the latter: a key that needs a package
        raise SimpoError(_located(str(error), settings)) from error


def is_required(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def _located(message: str, settings: Mapping[str, Setting]) -> str:
    """The message in one line, after the place of the first setting that it names, if that is in the file."""
    named = (settings[word] for word in re.findall(r"\w+", message) if word in settings)
    first = next(named, None)
    text = " ".join(message.split())
    return text if first is None or first.place is None else f"{first.place}: {text}"


# ---- What ``--help`` says of a recipe's keys.


_INDENT = 6 * " "


_MEANING = 40  # columns that a meaning is told in


def help_text(classes: Iterable[type]) -> str:
    """A field with its type, default and meaning, under the class that declares it."""
    width = shutil.get_terminal_size((140, 24)).columns
    lines = ["arguments: [RECIPE.yaml] [--key value ...]   (the recipe has the same keys)"]
    for cls in classes:
        annotations = annotations_of([cls])
        remaining = {field.name: field for field in fields_of(cls)}
        for base in cls.__mro__:
            own = [remaining.pop(name) for name in inspect.get_annotations(base) if name in remaining]
            lines += ["", base.__name__] if own else []
            for field in own:
                lines += _help_lines(field, annotations[field.name], width)
    return "\n".join(lines)


def _help_lines(field: dataclasses.Field, annotation: Any, width: int) -> list[str]:
    """One line where the terminal has room for a meaning, else the meaning below."""
    meaning = " ".join(field.metadata.get("help", "").split()).split(". ")[0]
    head = f"  {field.name:<30}  {describe(annotation):<24.24}  {_default(field):<16.16}  "
    if width >= len(head) + _MEANING:
        return [f"{head}{meaning}"[:width].rstrip()]
    return [head[:width].rstrip(), *textwrap.wrap(meaning, width, initial_indent=_INDENT, subsequent_indent=_INDENT)]


def _default(field: dataclasses.Field) -> str:
    if is_required(field):
        return "required"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return str(default.value if isinstance(default, Enum) else default)
