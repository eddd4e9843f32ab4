"""Items to judge: a prompt with two answers to compare, or several to rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpo.data.messages import Message, context_of
from simpo.runs.lines import read_lines


@dataclass(frozen=True)
class Item:
    """One thing to judge."""

    id: str  # of the pair, as `simpo compare` and `simpo pair` name pairs, or of the prompt
    prompt: str | list[Message]  # text or messages
    # Two or more answers, in the order of the file; never in the order in which they are shown.
    responses: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # tools and template variables that belong to the prompt

    @property
    def is_tie(self) -> bool:
        """Whether both answers are the same text, about which nobody needs to be asked."""
        return len(set(self.responses)) == 1

    def row(self) -> dict[str, Any]:
        """The item as a row of a file."""
        return {"id": self.id, "prompt": self.prompt, **self.columns, "responses": list(self.responses)}


def load_items(path: Path) -> list[Item]:
    """The items whose rows are in a file."""
    return [
        Item(row["id"], row["prompt"], tuple(row["responses"]), context_of(row).columns) for row in read_lines(path)
    ]
