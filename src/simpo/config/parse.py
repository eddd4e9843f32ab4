"""Reads a YAML file and a command line into dataclasses."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from simpo.config.command_line import help_text, read_command_line, split_recipe
from simpo.config.fields import Setting, build, check_installed, fit, keys_of
from simpo.config.foreign import known_spellings, objective_mistakes, paper_settings, resolve
from simpo.errors import CombinedError, SimpoError, third_party

logger = logging.getLogger(__package__)

_LARGEST = 100_000  # values of a recipe
_NO_OBJECTIVE = "objective: not given"


class _Loader(yaml.SafeLoader):
    """YAML without its traps: no key twice, a key or a date is text, ``1e-6`` is a number.

    Attributes:
        mistakes: the keys that are given twice.
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
    """The keys of a recipe with their lines; those that are given twice are added to ``mistakes``."""
    with _reading(path):
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        loader.name = path
        node = loader.get_single_node()
    settings = list(_settings(loader, node, path))
    mistakes += loader.mistakes
    return settings


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Report what PyYAML raises, which is anything, with the line where it has one."""
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
        raise SimpoError(f"{path}:{node.start_mark.line + 1}: a recipe is a mapping of keys to values")
    with _reading(path):
        if _expanded_size(node, {}) > _LARGEST:
            raise SimpoError(
                f"{path}: its aliases (*) repeat more than {_LARGEST:,} values, or a value contains itself"
            )
        loader.flatten_mapping(node)  # merge keys (<<); what they bring comes first, so that own keys win
    found = {}
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        with _reading(f"{place}: {key.value}"):
            plain = _plain(loader, value)
        found[key.value] = Setting(key.value, plain, place, f"{place}: {key.value}")
    yield from found.values()


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """The number of nodes in a node when all aliases in it are expanded; infinite if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # while its children are counted
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def _plain(loader: _Loader, node: yaml.Node) -> Any:
    """A scalar as its text (None for null), a list of these, or a mapping, its values typed by YAML."""
    value = loader.construct_object(node, deep=True)  # in any case, because it refuses what is unsafe
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item) for item in node.value]
    return node.value if isinstance(node, yaml.ScalarNode) and value is not None else value


def parse_settings(
    argv: list[str],
    types: tuple[type, ...],
    *,
    command: str = "",
    about: str | None = None,
    replaces: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[Any, ...]:
    """Read a command's settings from a YAML file, the command line, or both, into one instance of each of ``types``.

    The keys are the fields of the dataclasses, and of dataclasses that are their fields (see :mod:`.fields` for what
    a field can declare). The command line takes precedence over the file. On it ``--key value`` and ``--key=value``
    are the same, ``--flag`` is true, a list is several values or JSON, a mapping is JSON, and ``null`` is None. Older
    and foreign spellings are translated, and keys that mean nothing here are dropped, each with a warning of the
    package's logger. All mistakes are reported together.

    Args:
        argv: the arguments; the recipe, if any, comes first. ``--help`` anywhere prints the help.
        types: dataclasses; the annotations of their fields determine the values that fit.
        command: the command's name, for the help.
        about: what the command does, with examples, for the help: usually its module's docstring.
        replaces: keys that exclude one another: a key and the others with the same meaning. Given in one place,
            they are an error; given in both, those of the command line replace those of the file.

    Raises:
        SimpoError: an unreadable file, keys that are unknown, missing or given twice, values that do not fit, a tracker
            that is not installed, or a ValueError of a ``__post_init__``; names every key with its place.
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
            values[name] = fit(setting, keys[name].annotation)
            if name == "report_to":
                check_installed(values[name], setting.label)
        except SimpoError as error:
            mistakes.append(str(error))
            values.pop(name, None)
    return _build_all(types, values, settings, mistakes)


def _implied(path: str | None, in_file: Set[str], all_keys: Set[str], known: Set[str]) -> dict[str, Setting]:
    """Settings that the paper's own recipes do not contain because the paper's code always uses them."""
    found = {key: value for key, value in paper_settings(in_file, all_keys).items() if key in known}
    if found:
        shown = ", ".join(f"{key}: {value}" for key, value in found.items())
        logger.warning(
            "%s has the keys of the paper's own recipes: texts are tokenized and cut as by the paper's code (%s); set "
            "these keys to choose otherwise, and chat_template for another than the model's own (the paper's code has "
            "its own for models with 'mistral' in their name)",
            *(path, shown),
        )
    return {key: Setting(key, value, None, f"{path}: {key}") for key, value in found.items()}


def _build_all(
    types: tuple[type, ...], values: Mapping[str, Any], settings: Mapping[str, Setting], mistakes: list[str]
) -> tuple[Any, ...]:
    """An instance of each of ``types``; raises :class:`CombinedError` if there are ``mistakes``, with those found here.

    A required key whose value does not fit is already among the mistakes, and not also missing.
    """
    built = []
    unfit = settings.keys() - values.keys()
    for cls in types:
        if any(key.default is MISSING and key.name in unfit for key in keys_of([cls]).values()):
            continue
        found: tuple[Any, ...] = ()
        try:
            built.append(build(cls, values, settings))
        except SimpoError as error:
            found = error.args
        # One error about a missing objective is enough, whatever made it unclear.
        unclear = any(_NO_OBJECTIVE in mistake for mistake in mistakes)
        mistakes += [mistake for mistake in found if not (unclear and _NO_OBJECTIVE in mistake)]
    if mistakes:
        raise CombinedError(*dict.fromkeys(mistakes))
    return tuple(built)


def _merge(
    file: dict[str, Setting], line: dict[str, Setting], replaces: Mapping[str, tuple[str, ...]]
) -> dict[str, Setting]:
    """The command line over the file, without those of the file that it replaces."""
    replaced: dict[str, str] = {}
    for one, other in ((key, other) for key, others in replaces.items() for other in others):
        for place in (file, line):
            if one in place and other in place:
                raise SimpoError(f"{place[one].label}: cannot be given together with {place[other].label}")
        if one in line:
            replaced[other] = one
        if other in line:
            replaced[one] = other
    for key, by in replaced.items():
        if key in file:
            logger.warning("%s is replaced by %s", file[key].label, line[by].label)
    return {key: setting for key, setting in file.items() if key not in replaced} | line
