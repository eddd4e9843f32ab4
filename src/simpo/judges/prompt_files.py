"""Judge prompts in files: which one is used is part of a result."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from simpo.errors import SimpoError


class PromptFile(NamedTuple):
    """A prompt's text, and the SHA-256 of its file."""

    text: str
    digest: str


def read_prompt_file(path: Path | None, shipped: Traversable, places: Iterable[str]) -> PromptFile:
    """Read a prompt that has a place ``{name}`` for every value.

    Args:
        path: the user's file; None for the one that comes with the package.
        shipped: that one.
        places: names of the values.

    Raises:
        SimpoError: the file cannot be read, or lacks a place.
    """
    try:
        content = shipped.read_bytes() if path is None else path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SimpoError(f"{path}: the judge prompt cannot be read: {error}") from error
    for name in places:
        if f"{{{name}}}" not in text:
            raise SimpoError(f"{path}: the judge prompt has no place {{{name}}}")
    return PromptFile(text, hashlib.sha256(content).hexdigest())


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put values into ``{name}`` places; whatever else is in braces stays, and values are not looked into."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda place: values[place[1]], template)
