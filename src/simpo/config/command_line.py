"""``--key value`` and positional arguments as settings, and the path of the recipe among them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from simpo.config.coercion import accepts
from simpo.config.fields import Key, Setting
from simpo.errors import SimpoError

_DATA_SUFFIXES = (".jsonl", ".parquet", ".csv", ".arrow", ".gz", ".zst")  # not .json, which is YAML, too
_MODEL = ("model", "model_name_or_path")  # options that name the model of any command that takes one by position
_TRUTH = ("true", "false", "yes", "no", "on", "off", "1", "0")

Words = list[tuple[int, str]]  # with their positions on the command line


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

    ``--key value ...`` and ``--key=value`` are the same, and so are ``-`` and ``_`` in keys. Words before the first
    option, and those after an option that it cannot use, are the values of positional keys. An option for a list may be
    repeated; of others the last one counts.

    Args:
        arguments: those after the recipe.
        keys: the keys of the command.
        in_file: the keys that the recipe contains.

    Raises:
        SimpoError: a word that belongs to no key.
    """
    words, options = split_options(arguments)
    positionals = [key for key in keys.values() if key.positional]
    options = _rename_model_options(options, [key.name for key in positionals])
    given = {name for name, _ in options}
    unfilled = [key.name for key in positionals if key.name not in given]
    if len(words) < len(unfilled):
        not_in_file = [name for name in unfilled if name not in in_file]
        words = sorted(words + _take_unneeded_values(options, keys, max(0, len(not_in_file) - len(words))))
        unfilled = not_in_file if words and len(not_in_file) >= len(words) else unfilled
    several = unfilled[-1] if unfilled and accepts(keys[unfilled[-1]].annotation, list) else None
    if len(words) > len(unfilled) and several is None:
        usage = " ".join(["[RECIPE.yaml]", *(key.positional for key in positionals), "[--key value ...]"])
        raise SimpoError(f"{words[len(unfilled)][1]}: expected {usage}")
    settings = []
    if several is not None and len(words) >= len(unfilled):  # the last positional key takes all words that are left
        texts = [text for _, text in words[len(unfilled) - 1 :]]
        settings.append(Setting(several, texts, None, keys[several].positional))
        unfilled = unfilled[:-1]
    for name, (_, text) in zip(unfilled, words, strict=False):
        if keys[name].positional == "MODEL" and text.endswith(_DATA_SUFFIXES):
            remedy = (
                f"name it with --dataset_name {text}"
                if "dataset_name" in keys
                else "give the model before it or as --model MODEL"
            )
            raise SimpoError(f"{text} is a file of data, and not a model, which comes first; {remedy}")
        settings.append(Setting(name, text, None, keys[name].positional))
    merged: dict[str, list[str]] = {}
    for name, own in options:
        if name in keys and not accepts(keys[name].annotation, list):
            merged.pop(name, None)  # of an option that takes one value, the last occurrence counts
        merged.setdefault(name, []).extend(text for _, text in own)
    return settings + [Setting(name, _option_value(texts), None, f"--{name}") for name, texts in merged.items()]


def split_options(arguments: list[str]) -> tuple[Words, list[tuple[str, Words]]]:
    """The words before the first option, and every option with the words after it."""
    words: Words = []
    options: list[tuple[str, Words]] = []
    current = words
    for position, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            current = [(position, value)] if equals else []
            options.append((name.replace("-", "_"), current))
        else:
            current.append((position, argument))
    return words, options


def _rename_model_options(options: list[tuple[str, Words]], positionals: list[str]) -> list[tuple[str, Words]]:
    """The options with ``--model`` or ``--model_name_or_path`` under the name that the command has for its model."""
    models = [name for name in positionals if name in (*_MODEL, "a", "b")]
    given = [words for name, words in options if name in _MODEL]
    if not models or not given:
        return options
    if len(models) > 1 and len(given) != len(models):
        raise SimpoError(f"--model: this command takes {len(models)}, not {len(given)}")
    names = iter(models if len(models) > 1 else models * len(given))
    return [(next(names) if name in _MODEL else name, words) for name, words in options]


def _take_unneeded_values(options: list[tuple[str, Words]], keys: Mapping[str, Key], wanted: int) -> Words:
    """Remove up to ``wanted`` words from options that do not need them, as ``MODEL`` in ``--n 2 MODEL``."""
    found: Words = []
    for name, words in options:
        key = keys.get(name)
        if key is None or (accepts(key.annotation, list, dict) and not key.repeat):
            continue
        needed = 1
        if accepts(key.annotation, tuple):
            needed = 2
        elif accepts(key.annotation, bool) and not accepts(key.annotation, str, int, float):
            needed = int(bool(words) and words[0][1].lower() in _TRUTH)
        spare = words[needed:][: wanted - len(found)]
        if spare:
            found += spare
            words[:] = words[:needed] + words[needed + len(spare) :]
    return found


def _option_value(texts: list[str]) -> Any:
    if not texts:
        return True
    values = [None if text == "null" else text for text in texts]
    return values[0] if len(values) == 1 else values
