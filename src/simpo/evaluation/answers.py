"""A model's answers to a benchmark's questions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpo.atomic import write_text
from simpo.client import stand_in
from simpo.data.files import SUFFIXES
from simpo.data.prompts import Prompts
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.results import fingerprint
from simpo.runs.lines import read_lines
from simpo.sampling.job import Job
from simpo.sampling.loading import Checkpoint
from simpo.sampling.run import FILE_NAME, EngineName, PromptArguments, sample_responses
from simpo.sampling.settings import SamplingSettings
from simpo.training.device import free_memory, with_dtype
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
        rendering: how conversations are rendered.
    """

    model: ModelArguments
    settings: SamplingSettings
    chat_template: str | None = None
    engine: EngineName = "transformers"
    rendering: RenderSettings = field(default_factory=RenderSettings)

    @property
    def name(self) -> str:
        """What results call the model: the last part of its name."""
        return Path(self.model.model_name_or_path).name

    def identity(self) -> dict[str, Any]:
        """What determines the answers: weights, template, settings."""
        tokenizer = load_tokenizer(self.model.model_name_or_path, self.model, chat_template=self.chat_template)
        return {
            "model": model_digest(self.model),
            "dtype": with_dtype(self.model).dtype,
            "engine": self.engine,
            "chat_template": fingerprint(tokenizer.chat_template),
            **({} if self.rendering == RenderSettings() else {"rendering": str(self.rendering)}),
            **dataclasses.asdict(self.settings),
            "max_new_tokens": self.longest,
        }

    @property
    def longest(self) -> int:
        """Tokens that an answer may have.

        Raises:
            SimpoError: there is no such model, or its context leaves no room for a prompt.
        """
        resolved = self.settings.resolved(context=Checkpoint.read(self.model).context, chunk_size=1)
        assert resolved.max_new_tokens is not None
        return resolved.max_new_tokens

    def stand_in(self, name: str = "") -> str:
        """A text as long as an answer may be, to estimate what judging will cost; with another name another one."""
        return stand_in(self.longest, name)

    def fitting(self, source: PromptArguments) -> Prompts:
        """The prompts that will be answered: those for which the model's context has room, beside the longest answer.

        Raises:
            SimpoError: they cannot be read, or there is no room for any.
        """
        return Job.prepare(self.model, source, self.settings, self.engine, lambda line: None).prompts

    def answer(self, questions: Sequence[Question], folder: Path, *, temperature: float | None = None) -> list[str]:
        """One answer to every question, in their order.

        Args:
            questions: one that occurs twice is answered once.
            folder: of the sampling run, which goes on where it was.
            temperature: instead of the settings' own.

        Raises:
            SimpoError: as ``simpo sample``, or a question does not fit the model's context, which shows before anything
                is sampled.
        """
        prompts = folder.with_name(f"{folder.name}-questions.jsonl")
        prompts.parent.mkdir(parents=True, exist_ok=True)
        write_text(prompts, "".join(json.dumps({"prompt": question}) + "\n" for question in questions))
        settings = self.settings
        if temperature is not None:
            settings = dataclasses.replace(settings, temperature=temperature)
        asked = PromptArguments(str(prompts), chat_template=self.chat_template, rendering=self.rendering)
        self._check_all_fit(questions, asked)
        sample_responses(self.model, asked, settings, folder, engine=self.engine)
        free_memory()
        found = {_key(record["prompt"]): record["responses"][0] for record in read_lines(folder / FILE_NAME)}
        return [found[_key(question)] for question in questions]

    def _check_all_fit(self, questions: Sequence[Question], source: PromptArguments) -> None:
        fitting = {_key(prompt.content) for prompt in self.fitting(source)}
        missing = [question for question in questions if _key(question) not in fitting]
        if missing:
            raise SimpoError(
                f"{self.model.model_name_or_path}: its context has no room for {len(missing)} of {len(questions)} "
                f"questions beside an answer of {self.longest:,} tokens; set a smaller max_new_tokens; the first is "
                f"{str(missing[0])!r:.80}"
            )


def _key(question: object) -> str:
    return json.dumps(question, sort_keys=True)


def is_outputs_file(name: str) -> bool:
    """Whether a command was given a file of answers and not a model."""
    return name.endswith(SUFFIXES)
