"""What ``--help`` says of a recipe's keys."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING
from enum import Enum
from typing import Any

from simpo.coercion import describe
from simpo.recipe.fields import annotations_of, fields_of, is_required

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
