"""A model's answers to a benchmark's questions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.atomic import write_text
from simpo.data.files import SUFFIXES
from simpo.errors import SimpoError
from simpo.results import fingerprint
from simpo.runs.lines import read_lines
from simpo.sampling.run import FILE_NAME, EngineName, PromptArguments, sample_responses
from simpo.sampling.settings import SamplingSettings
from simpo.training.identity import model_digest
from simpo.training.model_arguments import ModelArguments
from simpo.training.models import load_tokenizer

# A text, or messages.
Question = str | list[dict[str, str]]


@dataclass(frozen=True)
class Answerer:
    """A model and how it answers.

    Attributes:
        model: which.
        settings: how answers are drawn; one to every question.
        chat_template: template, file with one, or ``none``; None for the model's own.
        engine: what generates.
    """

    model: ModelArguments
    settings: SamplingSettings
    chat_template: str | None = None
    engine: EngineName = "transformers"

    @property
    def name(self) -> str:
        """What results call the model: the last part of its name."""
        return Path(self.model.model_name_or_path).name

    def identity(self) -> dict[str, Any]:
        """What determines the answers: weights, template, settings."""
        tokenizer = load_tokenizer(self.model.model_name_or_path, self.model, chat_template=self.chat_template)
        return {
            "model": model_digest(self.model),
            "dtype": self.model.dtype,
            "engine": self.engine,
            "chat_template": fingerprint(tokenizer.chat_template),
            **dataclasses.asdict(self.settings),
        }

    def answer(self, questions: Sequence[Question], folder: Path, *, temperature: float | None = None) -> list[str]:
        """One answer to every question, in their order.

        Args:
            questions: one that occurs twice is answered once.
            folder: of the sampling run, which goes on where it was.
            temperature: instead of the settings' own.

        Raises:
            SimpoError: as ``simpo sample``, or a question does not fit the model's context.
        """
        prompts = folder.with_name(f"{folder.name}-questions.jsonl")
        prompts.parent.mkdir(parents=True, exist_ok=True)
        write_text(prompts, "".join(json.dumps({"prompt": question}) + "\n" for question in questions))
        settings = self.settings
        if temperature is not None:
            settings = dataclasses.replace(settings, temperature=temperature)
        asked = PromptArguments(str(prompts), chat_template=self.chat_template)
        sample_responses(self.model, asked, settings, folder, engine=self.engine)
        found = {_key(record["prompt"]): record["responses"][0] for record in read_lines(folder / FILE_NAME)}
        missing = [question for question in questions if _key(question) not in found]
        if missing:
            raise SimpoError(
                f"{self.model.model_name_or_path}: {len(missing)} of {len(questions)} questions got no answer, because "
                f"they and max_new_tokens do not fit the model's context; the first is {str(missing[0])!r:.80}"
            )
        return [found[_key(question)] for question in questions]


def _key(question: Question) -> str:
    return json.dumps(question, sort_keys=True)


def is_outputs_file(name: str) -> bool:
    """Whether a command was given a file of answers and not a model."""
    return name.endswith(SUFFIXES)
