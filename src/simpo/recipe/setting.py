"""A value that somebody gave, in a file or on the command line, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
