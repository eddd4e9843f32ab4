"""What Arena-Hard's judge is asked."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from simpo.client import ChatRequest
from simpo.errors import SimpoError
from simpo.evaluation.arena_hard.verdicts import Version
from simpo.judges.prompt_files import fill, read_prompt_file

_SHIPPED = resources.files("simpo.evaluation") / "prompts" / "arena_hard.yaml"
_LONGEST: dict[Version, int] = {"v0.1": 4096, "v2": 16000}  # tokens of a judgment


class ArenaPrompt:
    """A judge prompt: YAML with ``system_prompt`` and ``prompt_template``, as the benchmark's settings have them.

    The template has places ``{QUESTION}``, ``{ANSWER_A}`` and ``{ANSWER_B}`` (v2) or ``{question_1}``, ``{answer_1}``
    and ``{answer_2}`` (v0.1). ``system_prompts`` may name other system prompts by category.

    Attributes:
        digest: SHA-256 of the file.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the user's file or, for None, the one that comes with the package.

        Raises:
            SimpoError: it cannot be read, or lacks a part.
        """
        text, self.digest = read_prompt_file(path, _SHIPPED, ())
        settings = _mapping(text, path)
        template = settings.get("prompt_template")
        template = template[0] if isinstance(template, list) and template else template
        system = settings.get("system_prompt")
        if not isinstance(template, str) or not isinstance(system, str):
            raise SimpoError(f"{path}: a judge prompt of Arena-Hard has system_prompt and prompt_template")
        for names in (("QUESTION", "question_1"), ("ANSWER_A", "answer_1"), ("ANSWER_B", "answer_2")):
            if not any(f"{{{name}}}" in template for name in names):
                raise SimpoError(f"{path}: prompt_template has no place {{{names[0]}}}")
        self._template, self._system = template, system
        self._by_category: dict[str, str] = settings.get("system_prompts") or {}
        if not isinstance(self._by_category, dict) or not all(isinstance(x, str) for x in self._by_category.values()):
            raise SimpoError(f"{path}: system_prompts: expected a text for each category")

    def request(self, question: str, category: str, shown: tuple[str, str], version: Version) -> ChatRequest:
        """What the judge is asked about two answers in the order in which they are shown."""
        first, second = shown
        values = {"QUESTION": question, "ANSWER_A": first, "ANSWER_B": second}
        values |= {"question_1": question, "answer_1": first, "answer_2": second}
        messages = [
            {"role": "system", "content": self._by_category.get(category, self._system)},
            {"role": "user", "content": fill(self._template, values)},
        ]
        return ChatRequest(messages, max_tokens=_LONGEST[version])


def _mapping(text: str, where: Path | None) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SimpoError(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise SimpoError(f"{where}: a judge prompt of Arena-Hard has system_prompt and prompt_template")
    return found
