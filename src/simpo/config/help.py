"""The text of ``simpo COMMAND --help``: usage, examples, and every key with its meaning, type and default."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING
from enum import Enum
from typing import Any

from simpo.config.coercion import describe
from simpo.config.fields import Key, keys_of

_WIDTH = 100  # longer lines are hard to read, whatever the terminal's width
_NAME_COLUMN = 30


def help_text(command: str, about: str, classes: Iterable[type]) -> str:
    """The help of a command."""
    keys = list(keys_of(classes).values())
    usage = ["usage: simpo", command, "[RECIPE.yaml]", *(key.positional for key in keys if key.positional)]
    lines = [" ".join(filter(None, [*usage, "[--key value ...]"])), "", *inspect.cleandoc(about).splitlines(), ""]
    lines.append("Settings, as --key value or in the recipe as key: value, which --key overrides.")
    width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
    for owner in sorted(dict.fromkeys(key.owner for key in keys), key=_is_foreign):
        lines += ["", _title(owner)]
        for key in keys:
            lines += _key_lines(key, width) if key.owner is owner else []
    return "\n".join(lines)


def _title(owner: type) -> str:
    """The first sentence of a dataclass's docstring; its name if it has none or is one of transformers'."""
    text = inspect.getdoc(owner) or ""
    if _is_foreign(owner):
        return f"transformers' {owner.__name__}:"
    if text.startswith(f"{owner.__name__}("):  # the signature, which dataclasses without a docstring get
        return f"{owner.__name__}:"
    return f"{text.partition(chr(10))[0].replace('``', '').rstrip('.')}:"


def _is_foreign(owner: type) -> bool:
    return owner.__module__.startswith("transformers")


def _key_lines(key: Key, width: int) -> list[str]:
    meaning = key.help
    if _is_foreign(key.owner):
        meaning = meaning.partition(". ")[0].rstrip(".") + "."  # further sentences explain how it is implemented
    kind = describe(key.annotation) + (", may be repeated" if key.repeat else "")
    default = "required" if key.default is MISSING else f"default {_shown(key.default)}"
    bracket = f"[{kind}]" if key.default is None else f"[{kind}; {default}]"
    name = f"  {key.positional}, --{key.name}" if key.positional else f"  --{key.name}"
    indent = " " * _NAME_COLUMN
    text = textwrap.wrap(f"{meaning} {bracket}".strip(), width, initial_indent=indent, subsequent_indent=indent)
    if len(name) + 2 > _NAME_COLUMN:
        return [name, *text]
    return [name.ljust(_NAME_COLUMN) + text[0].lstrip(), *text[1:]]


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    return str(value).lower() if isinstance(value, bool) else str(value)
