"""Reads text files that users name, and YAML, with limits on size and aliases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from simpo.errors import SimpoError

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000  # values in a YAML document, with aliases expanded


def read_text_file(path: str | Path, max_bytes: int = _MAX_BYTES) -> str:
    r"""Read a UTF-8 file; raises :class:`SimpoError` if it has more than ``max_bytes``, as ``/dev/zero`` has.

    Lines end with ``\n``, whatever they end with in the file.
    """
    with Path(path).expanduser().open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise SimpoError(f"{path}: larger than {max_bytes >> 10:,} KiB, so it cannot be the file that is meant")
    return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def load_yaml(text: str, place: str) -> Any:
    """Load a YAML document as ``yaml.safe_load`` does, unless its aliases expand to too many values."""
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    check_aliases(node, place)
    return loader.construct_document(node)


def check_aliases(node: yaml.Node, place: str) -> None:
    """Raise :class:`SimpoError` if the aliases in ``node`` expand to too many values, or to infinitely many."""
    if _expanded_size(node, {}) > _MAX_VALUES:
        raise SimpoError(f"{place}: aliases (*) expand to over {_MAX_VALUES:,} values, or a value contains itself")


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Count the nodes within a node with all aliases expanded; infinite if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # while its children are counted
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]
