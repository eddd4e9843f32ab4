"""Answers of models: read from files, or sampled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from simpo.client import placeholder_answer
from simpo.data.prompts import Prompts, prompt_id
from simpo.data.rows import Row, rows_of
from simpo.data.settings import RenderSettings
from simpo.data.sources import SUFFIXES, load_rows
from simpo.errors import SimpoError
from simpo.generation.sample import FILE_NAME, EngineName, Job, PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings
from simpo.judging.annotate import checked_prompt
from simpo.judging.protocol import ShownAnswers
from simpo.models.checkpoint import Checkpoint, model_digest, with_dtype
from simpo.models.devices import free_memory
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.runs.files import read_lines, write_text
from simpo.runs.results import fingerprint

T = TypeVar("T")
Record = dict[str, Any]

# ---- Rows of files, with error messages that name the row and the cell.


def read_rows(path: str | Path) -> list[tuple[Row, str]]:
    """The rows of a file, each with its place for messages."""
    dataset = load_rows(str(Path(path).expanduser().resolve()), split="train")
    return rows_of(dataset[:], range(len(dataset)), Path(path).name)


def cell(row: Row, key: str, where: str, kind: type = str) -> Any:
    """A cell that must hold text or, with ``kind``, a list."""
    if key not in row:
        raise SimpoError(f"{where}: no {key!r}; it has {', '.join(sorted(row)) or 'no columns'}")
    if not isinstance(row[key], kind):
        expected = "text" if kind is str else "a list"
        raise SimpoError(f"{where}: {key}: expected {expected}, got {row[key]!r:.60}")
    return row[key]


def read_by_key(
    path: str | Path, key_name: str, parse: Callable[[Row, str], tuple[Any, T]]
) -> dict[Any, tuple[T, str]]:
    """Value and place of every row of a file by its key, in the order of the file.

    ``parse`` gives the key and the value of a row; its second argument is the row's place for messages, which call the
    key ``key_name``. No key may occur twice.
    """
    found: dict[Any, tuple[T, str]] = {}
    for row, where in read_rows(path):
        key, value = parse(row, where)
        if key in found:
            raise SimpoError(f"{where}: {key_name} {str(key)!r:.80} occurs twice, first at {found[key][1]}")
        found[key] = value, where
    return found


def read_answers(
    path: str | Path, key_name: str, parse: Callable[[Row, str], tuple[Any, T]], questions: Mapping[Any, str]
) -> list[T]:
    """Read the answers to given questions, in the order of the questions.

    ``questions`` has the place of every question by its key; the others are those of :func:`read_by_key`. Every
    question needs an answer, and every answer a question.
    """
    found = read_by_key(path, key_name, parse)
    unknown = [key for key in found if key not in questions]
    if unknown:
        raise SimpoError(
            f"{found[unknown[0]][1]}: {len(unknown)} of {len(found)} answers are to other questions than the "
            f"benchmark's; the first has {key_name} {str(unknown[0])!r:.80}"
        )
    missing = [key for key in questions if key not in found]
    if missing:
        raise SimpoError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer; the first is "
            f"{questions[missing[0]]} ({key_name} {str(missing[0])!r:.80})"
        )
    return [found[key][0] for key in questions]


def answers_path(name: str) -> Path:
    """The file of answers that a command was given: a file, or the folder of a run of ``simpo sample``."""
    path = Path(name).expanduser()
    return path / FILE_NAME if (path / FILE_NAME).is_file() else path


def is_answer_file(name: str) -> bool:
    """Whether a command was given a file of answers instead of a model."""
    return name.endswith(SUFFIXES)


def read_answer_file(path: Path) -> dict[str, Record]:
    """Prompts with their answers by the prompts' ids, in the order of the file.

    Rows are ``{id, prompt, responses}`` with whatever else ``simpo sample`` stores, or AlpacaEval's ``{instruction,
    output}``. An answer may be empty.
    """
    return {key: record for key, (record, _) in read_by_key(path, "prompt", _record).items()}


def _record(row: Row, where: str) -> tuple[str, Record]:
    if "instruction" in row and "output" in row:
        instruction, output = cell(row, "instruction", where), cell(row, "output", where)
        key = prompt_id(instruction)
        return key, {"id": key, "prompt": instruction, "responses": [output]}
    if isinstance(row.get("prompt"), dict):  # one message
        row = row | {"prompt": [row["prompt"]]}
    prompt = checked_prompt(row, where)
    return row["id"], row | {"prompt": prompt}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON array or, if the name ends in ``.jsonl``, JSON lines."""
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        write_text(path, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")


# ---- Questions and answers of benchmarks.


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question."""

    model: str
    turns: tuple[str, ...]  # the text of every turn
    tokens: int | None = None  # length by the benchmark's tokenizer; None if the file does not give it

    @property
    def text(self) -> str:
        """The text of the first turn, for benchmarks that have only one."""
        return self.turns[0]

    def shown(self, show: ShownAnswers) -> Answer:
        """The answer as the judge is shown it; a text that has changed has no known number of tokens."""
        turns = tuple(show(text) for text in self.turns)
        return self if turns == self.turns else replace(self, turns=turns, tokens=None)


@dataclass(frozen=True)
class Question:
    """A question of a benchmark."""

    key: Any  # what identifies it
    turns: tuple[str, ...]  # what the user writes in every turn
    where: str  # its place in a file, for messages
    category: str | None = None
    reference: Answer | None = None  # what the judge compares answers with: the baseline's answer, or a correct one

    @property
    def baseline(self) -> Answer:
        """The reference, for benchmarks in which every question has one."""
        assert self.reference is not None
        return self.reference


# ---- Answers that are sampled.


@dataclass(frozen=True)
class Answerer:
    """A model and how it answers."""

    model: ModelArguments
    settings: SamplingSettings
    chat_template: str | None = None  # a template, a file with one, or "none"; None for the model's own
    engine: EngineName = "transformers"
    rendering: RenderSettings = field(default_factory=RenderSettings)

    @property
    def name(self) -> str:
        """The name of the model in results: the last part of its path."""
        return Path(self.model.model_name_or_path).name

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer."""
        resolved = self.settings.resolved(context=Checkpoint.read(self.model).context, chunk_size=1)
        assert resolved.max_new_tokens is not None
        return resolved.max_new_tokens

    def identity(self) -> dict[str, Any]:
        """Everything that determines the answers: weights, template, settings."""
        tokenizer = load_tokenizer(self.model, chat_template=self.chat_template)
        return {
            "model": model_digest(self.model),
            "dtype": with_dtype(self.model).dtype,
            "engine": self.engine,
            "chat_template": fingerprint(tokenizer.chat_template),
            **({} if self.rendering == RenderSettings() else {"rendering": str(self.rendering)}),
            **dataclasses.asdict(self.settings),
            "max_new_tokens": self.max_new_tokens,
        }

    def placeholder_answer(self, name: str = "") -> str:
        """A text as long as an answer may be, to estimate the cost of judging; different names give different texts."""
        return placeholder_answer(self.max_new_tokens, name)

    def fitting(self, source: PromptArguments) -> Prompts:
        """The prompts that will be answered: those that leave room for an answer in the model's context."""
        return Job.prepare(self.model, source, self.settings, self.engine, lambda line: None).prompts

    def answer(
        self, questions: Sequence[str | list[dict[str, str]]], folder: Path, *, temperature: float | None = None
    ) -> list[str]:
        """Sample one answer to every text or conversation, in their order; one that occurs twice is answered once.

        ``folder`` is that of the sampling run, which is continued if it was stopped; ``temperature`` replaces the one
        in the settings. Before anything is sampled, questions that do not fit the context are refused.
        """
        prompts = folder.with_name(f"{folder.name}-questions.jsonl")
        prompts.parent.mkdir(parents=True, exist_ok=True)
        write_text(prompts, "".join(json.dumps({"prompt": question}) + "\n" for question in questions))
        source = PromptArguments(str(prompts), chat_template=self.chat_template, rendering=self.rendering)
        fitting = {_key(prompt.content) for prompt in self.fitting(source)}
        too_long = [question for question in questions if _key(question) not in fitting]
        if too_long:
            raise SimpoError(
                f"{self.model.model_name_or_path}: its context has no room for {len(too_long)} of {len(questions)} "
                f"questions and an answer of {self.max_new_tokens:,} tokens; set a smaller max_new_tokens; the first "
                f"is {str(too_long[0])!r:.80}"
            )
        settings = self.settings
        if temperature is not None:
            settings = dataclasses.replace(settings, temperature=temperature)
        sample_responses(self.model, source, settings, folder, engine=self.engine)
        free_memory()
        found = {_key(record["prompt"]): record["responses"][0] for record in read_lines(folder / FILE_NAME)}
        return [found[_key(question)] for question in questions]


def _key(question: object) -> str:
    return json.dumps(question, sort_keys=True)
