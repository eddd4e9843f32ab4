"""Command lines: ``--key value`` and positional arguments as settings, and the text of ``--help``."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Set
from dataclasses import MISSING
from enum import Enum
from pathlib import Path
from typing import Any

from simpo.config.coercion import accepts, describe
from simpo.config.fields import Key, Setting, keys_of
from simpo.errors import SimpoError

_DATA_SUFFIXES = (".jsonl", ".parquet", ".csv", ".arrow", ".gz", ".zst")  # not .json, which is YAML, too
_MODEL = ("model", "model_name_or_path")  # options that name the model of any command that takes one by position
_TRUTH = ("true", "false", "yes", "no", "on", "off", "1", "0")


def split_recipe(arguments: list[str], keys: Mapping[str, Key]) -> tuple[str | None, list[str]]:
    """The path of the recipe, which can only be the first argument, and the other arguments.

    Where a command takes other files by position, only a file called ``.yaml`` or ``.yml`` is a recipe.
    """
    if not arguments or arguments[0].startswith("-"):
        return None, arguments
    first = arguments[0]
    expected = [key.positional for key in keys.values() if key.positional]
    is_recipe = not expected or first.endswith((".yaml", ".yml"))
    if expected[:1] == ["MODEL"] and not first.endswith(_DATA_SUFFIXES):
        is_recipe = is_recipe or Path(first).is_file()
    return (first, arguments[1:]) if is_recipe else (None, arguments)


def read_command_line(arguments: list[str], keys: Mapping[str, Key], in_file: Set[str]) -> list[Setting]:
    """The settings of the command line, after the recipe, in their order.

    ``--key value ...`` and ``--key=value`` are the same, and so are ``-`` and ``_`` in keys. Arguments before the first
    option, and those after an option that it cannot use, are the values of positional keys. An option for a list may be
    repeated; of others the last one counts. ``in_file`` are the keys that the recipe contains.
    """
    plain, options = split_options(arguments)
    positionals = [key for key in keys.values() if key.positional]
    options = _rename_model_options(options, [key.name for key in positionals])
    named = {name for name, _ in options}
    unfilled = [key.name for key in positionals if key.name not in named]
    if len(plain) < len(unfilled):
        not_in_file = [name for name in unfilled if name not in in_file]
        plain += _take_unneeded_values(options, keys, max(0, len(not_in_file) - len(plain)))
        unfilled = not_in_file if plain and len(not_in_file) >= len(plain) else unfilled
    list_key = unfilled[-1] if unfilled and accepts(keys[unfilled[-1]].annotation, list) else None
    if len(plain) > len(unfilled) and list_key is None:
        text = plain[len(unfilled)]
        if text.endswith(_DATA_SUFFIXES) and "dataset_name" in keys:
            raise SimpoError(f"{text} is a data file; name it with --dataset_name {text}")
        usage = " ".join(["[RECIPE.yaml]", *(key.positional for key in positionals), "[--key value ...]"])
        raise SimpoError(f"{text}: expected {usage}")
    settings = []
    if list_key is not None and len(plain) >= len(unfilled):  # the last positional key takes all that are left
        settings.append(Setting(list_key, plain[len(unfilled) - 1 :], None, keys[list_key].positional))
        unfilled = unfilled[:-1]
    for name, text in zip(unfilled, plain, strict=False):
        if keys[name].positional == "MODEL" and text.endswith(_DATA_SUFFIXES):
            remedy = (
                f"name it with --dataset_name {text}"
                if "dataset_name" in keys
                else "give the model before it or as --model MODEL"
            )
            raise SimpoError(f"{text} is a data file, not a model, which comes first; {remedy}")
        settings.append(Setting(name, text, None, keys[name].positional))
    merged: dict[str, list[str]] = {}
    for name, values in options:
        if name in keys and not accepts(keys[name].annotation, list):
            merged.pop(name, None)  # the last occurrence of an option that takes one value counts
        merged.setdefault(name, []).extend(values)
    return settings + [Setting(name, _option_value(texts), None, f"--{name}") for name, texts in merged.items()]


def split_options(arguments: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The arguments before the first option, and every option with the arguments after it."""
    plain: list[str] = []
    options: list[tuple[str, list[str]]] = []
    current = plain
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            current = [value] if equals else []
            options.append((name.replace("-", "_"), current))
        else:
            current.append(argument)
    return plain, options


def _rename_model_options(options: list[tuple[str, list[str]]], positionals: list[str]) -> list[tuple[str, list[str]]]:
    """The options, with ``--model`` and ``--model_name_or_path`` renamed to the command's key for its model."""
    models = [name for name in positionals if name in (*_MODEL, "a", "b")]
    count = sum(name in _MODEL for name, _ in options)
    if not models or not count:
        return options
    if len(models) > 1 and count != len(models):
        raise SimpoError(f"--model: this command takes {len(models)}, not {count}")
    names = iter(models if len(models) > 1 else models * count)
    return [(next(names) if name in _MODEL else name, values) for name, values in options]


def _take_unneeded_values(options: list[tuple[str, list[str]]], keys: Mapping[str, Key], wanted: int) -> list[str]:
    """Remove up to ``wanted`` values from options that do not need them, as ``MODEL`` in ``--n 2 MODEL``."""
    found: list[str] = []
    for name, values in options:
        key = keys.get(name)
        if key is None or (accepts(key.annotation, list, dict) and not key.repeat):
            continue
        needed = 1
        if accepts(key.annotation, tuple):
            needed = 2
        elif accepts(key.annotation, bool) and not accepts(key.annotation, str, int, float):
            needed = int(bool(values) and values[0].lower() in _TRUTH)
        spare = values[needed:][: wanted - len(found)]
        if spare:
            found += spare
            values[:] = values[:needed] + values[needed + len(spare) :]
    return found


def _option_value(texts: list[str]) -> Any:
    if not texts:
        return True
    values = [None if text == "null" else text for text in texts]
    return values[0] if len(values) == 1 else values


# ---- The text of `simpo COMMAND --help`: usage, examples, and every key with its meaning, type and default.

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
