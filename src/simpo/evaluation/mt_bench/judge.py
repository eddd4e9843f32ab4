"""What MT-Bench's judge is asked about a turn."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from simpo.client import ChatRequest
from simpo.errors import SimpoError
from simpo.evaluation.mt_bench.files import Question, Turns
from simpo.evaluation.rows import text_in
from simpo.judges.prompt_files import fill, read_prompt_file

_SHIPPED = resources.files("simpo.evaluation") / "prompts" / "mt_bench.jsonl"
_LONGEST = 2048  # tokens of a judgment
# Prompts by whether there is a reference and by turn, with what they need.
_NAMES = {
    (False, 1): ("single-v1", ("question", "answer")),
    (False, 2): ("single-v1-multi-turn", ("question_1", "answer_1", "question_2", "answer_2")),
    (True, 1): ("single-math-v1", ("question", "answer", "ref_answer_1")),
    (True, 2): (
        "single-math-v1-multi-turn",
        ("question_1", "answer_1", "question_2", "answer_2", "ref_answer_1", "ref_answer_2"),
    ),
}


class RatingPrompts:
    """The four judge prompts: JSON lines ``{name, system_prompt, prompt_template}``, as in the benchmark's own file.

    Attributes:
        digest: SHA-256 of the file.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the user's file or, for None, the one that comes with the package.

        Raises:
            SimpoError: it cannot be read, or lacks a prompt or a place.
        """
        text, self.digest = read_prompt_file(path, _SHIPPED, ())
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            named = {text_in(row, "name", f"{path}"): row for row in rows}
        except (ValueError, TypeError) as error:
            raise SimpoError(f"{path}: not judge prompts of MT-Bench ({type(error).__name__}: {error})") from error
        self._prompts = {
            name: tuple(text_in(row, key, f"{path}: {name}") for key in ("system_prompt", "prompt_template"))
            for name, row in named.items()
        }
        for name, places in _NAMES.values():
            for place in places:
                if f"{{{place}}}" not in self._prompts.get(name, ("", ""))[1]:
                    raise SimpoError(f"{path}: the judge prompt {name} is missing, or has no place {{{place}}}")

    def request(self, question: Question, answers: Turns, turn: int) -> ChatRequest:
        """What the judge is asked about the first turn (1) or, with the first before it, the second (2)."""
        values = {
            "question": question.turns[0],
            "answer": answers[0],
            "question_1": question.turns[0],
            "answer_1": answers[0],
            "question_2": question.turns[1],
            "answer_2": answers[1],
        }
        if question.reference is not None:
            values |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
        name, _ = _NAMES[question.reference is not None, turn]
        system, template = self._prompts[name]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": fill(template, values)}]
        return ChatRequest(messages, max_tokens=_LONGEST)
