"""The settings of a YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from simpo.errors import SimpoError
from simpo.recipe.setting import Setting


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
    """The keys of a recipe with their lines; those that are given twice are added to ``mistakes``.

    Raises:
        SimpoError: the file cannot be read or is not a mapping.
    """
    if path.endswith((".jsonl", ".parquet", ".csv", ".arrow", ".gz", ".zst")):
        raise SimpoError(f"{path}: a file of data and not a recipe; name it with --dataset_name {path}")
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        loader.name = path
        settings = list(_settings(loader, path))
        mistakes += loader.mistakes
        return settings
    except OSError as error:
        raise SimpoError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SimpoError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = path if mark is None else f"{path}:{mark.line + 1}"
        raise SimpoError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error


def _settings(loader: _Loader, path: str) -> Iterator[Setting]:
    node = loader.get_single_node()
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise SimpoError(f"{path}:{node.start_mark.line + 1}: a recipe is a mapping of keys to values")
    loader.flatten_mapping(node)  # merge keys (<<); what they bring comes first, so that own keys win
    found = {}
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        found[key.value] = Setting(key.value, _plain(loader, value), place, f"{place}: {key.value}")
    yield from found.values()


def _plain(loader: _Loader, node: yaml.Node) -> Any:
    """A scalar as its text (None for null), a list of these, or a mapping, its values typed by YAML."""
    value = loader.construct_object(node, deep=True)  # in any case, because it refuses what is unsafe
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item) for item in node.value]
    return node.value if isinstance(node, yaml.ScalarNode) and value is not None else value
