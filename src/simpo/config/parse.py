"""Parses a YAML file and the command line into dataclasses, and renders ``--help``."""

from __future__ import annotations

import inspect
import logging
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import MISSING
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from simpo.config.fields import Key, Setting, accepts, build, check_installed, convert_setting, describe, keys_of
from simpo.config.foreign import known_spellings, objective_mistakes, paper_settings, resolve
from simpo.config.text import check_aliases, read_text_file
from simpo.errors import CombinedError, SimpoError, third_party

_DATA_SUFFIXES = (".jsonl", ".parquet", ".csv", ".arrow", ".gz", ".zst")  # not .json, which is also valid YAML
_MODEL_OPTIONS = ("model", "model_name_or_path")  # options accepted by any command that takes its model by position
_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def split_recipe(arguments: list[str], keys: Mapping[str, Key]) -> tuple[str | None, list[str]]:
    """Return the path of the recipe, which can only be the first argument, and the other arguments.

    If a command takes other files by position, only a ``.yaml`` or ``.yml`` file is a recipe.
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
    """Return the settings given on the command line after the recipe, in order.

    ``--key value ...`` and ``--key=value`` are equivalent, as are ``-`` and ``_`` in keys. Positional keys get the
    arguments before the first option, and values that an option cannot use. List options may be repeated; for other
    options the last one wins. ``in_file`` holds the keys that the recipe contains.
    """
    plain, options = split_options(arguments)
    positionals = [key for key in keys.values() if key.positional]
    options = _rename_model_options(options, [key.name for key in positionals])
    named = {name for name, _ in options}
    unfilled = [key.name for key in positionals if key.name not in named]
    if len(plain) < len(unfilled):
        not_in_file = [name for name in unfilled if name not in in_file]
        plain += _take_spare_values(options, keys, max(0, len(not_in_file) - len(plain)))
        unfilled = not_in_file if plain and len(not_in_file) >= len(plain) else unfilled
    list_key = unfilled[-1] if unfilled and accepts(keys[unfilled[-1]].annotation, list) else None
    if len(plain) > len(unfilled) and list_key is None:
        text = plain[len(unfilled)]
        if text.endswith(_DATA_SUFFIXES) and "dataset_name" in keys:
            raise SimpoError(f"{text} is a data file; pass the file as --dataset_name {text}")
        usage = " ".join(["[RECIPE.yaml]", *(key.positional for key in positionals), "[--key value ...]"])
        raise SimpoError(f"{text}: expected {usage}")
    settings = []
    if list_key is not None and len(plain) >= len(unfilled):  # the last positional key takes all remaining values
        settings.append(Setting(list_key, plain[len(unfilled) - 1 :], None, keys[list_key].positional))
        unfilled = unfilled[:-1]
    for name, text in zip(unfilled, plain, strict=False):
        if keys[name].positional == "MODEL" and text.endswith(_DATA_SUFFIXES):
            remedy = (
                f"pass the file as --dataset_name {text}"
                if "dataset_name" in keys
                else "put the model before it or pass --model MODEL"
            )
            raise SimpoError(f"{text} is a data file, but the model comes first; {remedy}")
        settings.append(Setting(name, text, None, keys[name].positional))
    merged: dict[str, list[str]] = {}
    for name, values in options:
        if name in keys and not accepts(keys[name].annotation, list):
            merged.pop(name, None)  # the last occurrence of an option that takes one value wins
        merged.setdefault(name, []).extend(values)
    return settings + [Setting(name, _option_value(texts), None, f"--{name}") for name, texts in merged.items()]


def split_options(arguments: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the arguments before the first option, and every option with the arguments that follow it."""
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
    """Rename ``--model`` and ``--model_name_or_path`` to the command's own key for its model."""
    models = [name for name in positionals if name in (*_MODEL_OPTIONS, "a", "b")]
    count = sum(name in _MODEL_OPTIONS for name, _ in options)
    if not models or not count:
        return options
    if len(models) > 1 and count != len(models):
        raise SimpoError(f"--model: this command takes {len(models)} models, not {count}")
    names = iter(models if len(models) > 1 else models * count)
    return [(next(names) if name in _MODEL_OPTIONS else name, values) for name, values in options]


def _take_spare_values(options: list[tuple[str, list[str]]], keys: Mapping[str, Key], wanted: int) -> list[str]:
    """Take up to ``wanted`` values from options that do not need them, such as ``MODEL`` in ``--n 2 MODEL``."""
    taken: list[str] = []
    for name, values in options:
        key = keys.get(name)
        if key is None or (accepts(key.annotation, list, dict) and not key.repeat):
            continue
        needed = 1
        if accepts(key.annotation, tuple):
            needed = 2
        elif accepts(key.annotation, bool) and not accepts(key.annotation, str, int, float):
            needed = int(bool(values) and values[0].lower() in _BOOLEANS)
        spare = values[needed:][: wanted - len(taken)]
        if spare:
            taken += spare
            values[:] = values[:needed] + values[needed + len(spare) :]
    return taken


def _option_value(texts: list[str]) -> Any:
    if not texts:
        return True
    values = [None if text == "null" else text for text in texts]
    return values[0] if len(values) == 1 else values


# ---- `simpo COMMAND --help`: usage, examples, and every key with its meaning, type and default.

_WIDTH = 100  # longer lines are hard to read, however wide the terminal is
_NAME_COLUMN = 30


def help_text(command: str, about: str, classes: Iterable[type]) -> str:
    """Return the help text of a command."""
    keys = list(keys_of(classes).values())
    usage = ["usage: simpo", command, "[RECIPE.yaml]", *(key.positional for key in keys if key.positional)]
    lines = [" ".join(filter(None, [*usage, "[--key value ...]"])), "", *inspect.cleandoc(about).splitlines(), ""]
    lines.append("Give settings as --key value, or as key: value in the recipe; the command line takes precedence.")
    width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
    for owner in sorted(dict.fromkeys(key.owner for key in keys), key=_is_foreign):
        lines += ["", _title(owner)]
        for key in keys:
            lines += _key_lines(key, width) if key.owner is owner else []
    return "\n".join(lines)


def _title(owner: type) -> str:
    """Return the first line of a dataclass's docstring; its name if it has none or belongs to transformers."""
    text = inspect.getdoc(owner) or ""
    if _is_foreign(owner):
        return f"transformers' {owner.__name__}:"
    if text.startswith(f"{owner.__name__}("):  # dataclasses without a docstring get their signature
        return f"{owner.__name__}:"
    return f"{text.partition(chr(10))[0].replace('``', '').rstrip('.')}:"


def _is_foreign(owner: type) -> bool:
    return owner.__module__.startswith("transformers")


def _key_lines(key: Key, width: int) -> list[str]:
    meaning = key.help
    if _is_foreign(key.owner):
        meaning = meaning.partition(". ")[0].rstrip(".") + "."  # the other sentences are implementation details
    kind = describe(key.annotation) + (", may be repeated" if key.repeat else "")
    default = "required" if key.default is MISSING else f"default {_format_value(key.default)}"
    bracket = f"[{kind}]" if key.default is None else f"[{kind}; {default}]"
    name = f"  {key.positional}, --{key.name}" if key.positional else f"  --{key.name}"
    indent = " " * _NAME_COLUMN
    text = textwrap.wrap(f"{meaning} {bracket}".strip(), width, initial_indent=indent, subsequent_indent=indent)
    if len(name) + 2 > _NAME_COLUMN:
        return [name, *text]
    return [name.ljust(_NAME_COLUMN) + text[0].lstrip(), *text[1:]]


def _format_value(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- Reading the file, and merging it with the command line.

logger = logging.getLogger(__package__)

_MAX_BYTES = 1 << 18  # of a recipe; PyYAML needs seconds for more
_NO_OBJECTIVE = "objective: not given"


class _Loader(yaml.SafeLoader):
    """YAML without its traps: no duplicate keys, keys and dates are text, ``1e-6`` is a number.

    Attributes:
        mistakes: one error for each duplicate key.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.mistakes: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise SimpoError(f"{self.name}:{line}: a key must be text")
            if key.value in lines:
                self.mistakes.append(f"{self.name}:{line}: {key.value}: already given on line {lines[key.value]}")
            lines.setdefault(key.value, line)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_file(path: str, mistakes: list[str]) -> list[Setting]:
    """Return the settings in a recipe; errors about duplicate keys are appended to ``mistakes``."""
    with _reading(path):
        loader = _Loader(read_text_file(path, _MAX_BYTES))
        loader.name = path
        node = loader.get_single_node()
    settings = list(_settings(loader, node, path))
    mistakes += loader.mistakes
    return settings


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Report whatever PyYAML raises, with the line number if there is one."""
    with third_party(f"{place}: cannot be read"):
        try:
            yield
        except yaml.MarkedYAMLError as error:
            if (mark := error.problem_mark) is None:
                raise
            raise SimpoError(f"{mark.name}:{mark.line + 1}: not YAML: {error.problem or error}") from error


def _settings(loader: _Loader, node: yaml.Node | None, path: str) -> Iterator[Setting]:
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise SimpoError(f"{path}:{node.start_mark.line + 1}: a recipe must be a mapping of keys to values")
    with _reading(path):
        check_aliases(node, path)
        loader.flatten_mapping(node)  # expands merge keys (<<) in front of the mapping's own keys, which thus win
    settings = {}
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        with _reading(f"{place}: {key.value}"):
            plain = _to_plain(loader, value)
        settings[key.value] = Setting(key.value, plain, place, f"{place}: {key.value}")
    yield from settings.values()


def _to_plain(loader: _Loader, node: yaml.Node) -> Any:
    """Return a scalar as its text (None for null), a sequence as a list of these, or a mapping with YAML's types."""
    value = loader.construct_object(node, deep=True)  # even if unused, because it rejects unsafe tags
    if isinstance(node, yaml.SequenceNode):
        return [_to_plain(loader, item) for item in node.value]
    return node.value if isinstance(node, yaml.ScalarNode) and value is not None else value


def parse_settings(
    argv: list[str],
    types: tuple[type, ...],
    *,
    command: str = "",
    about: str | None = None,
    replaces: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[Any, ...]:
    """Parse a command's settings from a YAML file, the command line, or both, into one instance of each of ``types``.

    Keys are the fields of these dataclasses and of the dataclasses nested in them (see :mod:`.fields` for what a field
    can declare). The command line overrides the file. It accepts ``--key value`` and ``--key=value``; ``--flag`` means
    true, a list is several values or JSON, a mapping is JSON, and ``null`` is None. Older spellings and other toolkits'
    keys are translated, and keys without any effect here are dropped, each with a logged warning. All mistakes are
    reported together.

    Args:
        argv: the arguments, starting with the recipe if there is one. ``--help`` anywhere prints the help.
        types: dataclasses; the annotations of their fields determine which values are accepted.
        command: the command's name, for the help.
        about: what the command does, with examples, for the help: usually its module's docstring.
        replaces: mutually exclusive keys: each key with the others that mean the same. Given in the same place, they
            are an error; otherwise the one on the command line replaces the one in the file.

    Raises:
        SimpoError: the file cannot be read; a key is unknown, missing or given twice; a value is not accepted; a
            tracker is not installed; or a ``__post_init__`` raised ValueError. Names every key and its place.
        SystemExit: with code 0, after ``--help``.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(command, about or "", types))
        raise SystemExit(0)
    keys = keys_of(types)
    mistakes: list[str] = []
    path, arguments = split_recipe(argv, keys)
    file = [] if path is None else read_file(path, mistakes)
    in_file = {setting.key for setting in file}
    spellings = known_spellings(keys.keys())
    aliases = {key: alias for key, alias in spellings.items() if isinstance(alias, str)}
    line = read_command_line(arguments, keys, {aliases.get(key, key) for key in in_file})

    all_keys = in_file | {setting.key for setting in line}
    if "objective" in keys:
        mistakes += objective_mistakes({setting.key: setting.value for setting in (*file, *line)})
    settings = _merge(
        resolve(file, keys.keys(), spellings, all_keys, mistakes),
        resolve(line, keys.keys(), spellings, all_keys, mistakes),
        replaces or {},
    )
    settings |= _implied(path, in_file, all_keys, keys.keys())
    values = {}
    for name, setting in settings.items():
        try:
            values[name] = convert_setting(setting, keys[name].annotation)
            if name == "report_to":
                check_installed(values[name], setting.label)
        except SimpoError as error:
            mistakes.append(str(error))
            values.pop(name, None)
    return _build_all(types, values, settings, mistakes)


def _implied(path: str | None, in_file: Set[str], all_keys: Set[str], known: Set[str]) -> dict[str, Setting]:
    """Return the settings that the paper's own recipes leave out because its code hard-codes them."""
    implied = {key: value for key, value in paper_settings(in_file, all_keys).items() if key in known}
    if implied:
        shown = ", ".join(f"{key}: {value}" for key, value in implied.items())
        logger.warning(
            "%s has the keys of the paper's own recipes: text is tokenized and truncated as in the paper's code (%s); "
            "set these keys to change that, and chat_template to replace the model's own (the paper's code has another "
            "one for models with 'mistral' in their name)",
            *(path, shown),
        )
    return {key: Setting(key, value, None, f"{path}: {key}") for key, value in implied.items()}


def _build_all(
    types: tuple[type, ...], values: Mapping[str, Any], settings: Mapping[str, Setting], mistakes: list[str]
) -> tuple[Any, ...]:
    """Build an instance of each of ``types``; raise :class:`CombinedError` for ``mistakes`` and any found here.

    A required key with an invalid value is already among the mistakes and is not reported as missing as well.
    """
    built = []
    unfit = settings.keys() - values.keys()
    for cls in types:
        if any(key.default is MISSING and key.name in unfit for key in keys_of([cls]).values()):
            continue
        errors: tuple[Any, ...] = ()
        try:
            built.append(build(cls, values, settings))
        except SimpoError as error:
            errors = error.args
        # One error about a missing objective is enough.
        unclear = any(_NO_OBJECTIVE in mistake for mistake in mistakes)
        mistakes += [mistake for mistake in errors if not (unclear and _NO_OBJECTIVE in mistake)]
    if mistakes:
        raise CombinedError(*dict.fromkeys(mistakes))
    return tuple(built)


def _merge(
    file: dict[str, Setting], line: dict[str, Setting], replaces: Mapping[str, tuple[str, ...]]
) -> dict[str, Setting]:
    """Merge the settings: the command line overrides the file, and drops the keys there that it replaces."""
    replaced: dict[str, str] = {}
    for a, b in ((key, b) for key, others in replaces.items() for b in others):
        for place in (file, line):
            if a in place and b in place:
                raise SimpoError(f"{place[a].label}: cannot be combined with {place[b].label}; keep one of them")
        if a in line:
            replaced[b] = a
        if b in line:
            replaced[a] = b
    for key, by in replaced.items():
        if key in file:
            logger.warning("%s is replaced by %s", file[key].label, line[by].label)
    return {key: setting for key, setting in file.items() if key not in replaced} | line
