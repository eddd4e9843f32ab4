"""Judge prompts: templates with their values, and answers with or without their thinking."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from simpo.errors import SimpoError, third_party
from simpo.generation.responses import split_thinking
from simpo.judging.protocol import Prompt
from simpo.runs.results import Metric


def as_text(prompt: Prompt) -> str:
    """A prompt as one text: a single message is its content; a longer conversation names the roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class PromptFile(NamedTuple):
    """The text of a judge prompt, and the SHA-256 of its file, which is part of a result's identity."""

    text: str
    digest: str


def read_prompt_file(path: Path | None, shipped: Traversable, places: Iterable[str]) -> PromptFile:
    """Read a judge prompt that contains a placeholder ``{name}`` for every one of ``places``.

    ``path`` is the user's file; None for ``shipped``, the one in the package.
    """
    with third_party(f"{path}: the judge prompt cannot be read"):
        content = shipped.read_bytes() if path is None else path.read_bytes()
        text = content.decode("utf-8")
    for name in places:
        if f"{{{name}}}" not in text:
            raise SimpoError(f"{path}: the judge prompt lacks the placeholder {{{name}}}")
    return PromptFile(text, hashlib.sha256(content).hexdigest())


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace ``{name}`` placeholders in one pass: other braces stay, and values are not searched for placeholders."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


class ShownAnswers:
    """Maps an answer to the text that judges are shown, and counts the answers that contain thinking."""

    def __init__(self, strip_thinking: bool) -> None:
        self._strip = strip_thinking
        self._answers = self._thinking = self._endless = 0

    def __call__(self, answer: str) -> str:
        """The answer, or the part after its thinking."""
        thinking, rest = split_thinking(answer)
        self._answers += 1
        self._thinking += bool(thinking)
        self._endless += bool(thinking) and not rest
        return rest if self._strip else answer

    def metrics(self, prefix: str, log: Callable[[str], None]) -> list[Metric]:
        """Counts of answers with thinking, of those with nothing else, and of those from which it was removed.

        Empty if no answer had any; otherwise one line is logged. ``prefix`` starts the names of the metrics.
        """
        if not self._thinking:
            return []
        treatment = "judges are not shown it" if self._strip else "judges are shown it: --strip_thinking removes it"
        log(f"note: {self._thinking:,} of {self._answers:,} answers begin with thinking; {treatment}")
        counts = {"with_thinking": self._thinking, "without_end_of_thinking": self._endless}
        counts |= {"stripped_of_thinking": self._thinking * self._strip}
        return [Metric(f"{prefix}answers_{key}", count, n=self._answers) for key, count in counts.items()]
