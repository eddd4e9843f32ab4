"""Questions and answers of benchmarks: read from files, or sampled from a model."""

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
from simpo.judging.protocol import ThinkingFilter
from simpo.models.checkpoint import Checkpoint, model_digest, with_dtype
from simpo.models.devices import free_memory
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.runs.files import read_lines, write_text
from simpo.runs.results import fingerprint

T = TypeVar("T")
Record = dict[str, Any]

# ---- Reading rows, with errors that name the row and the column.


def read_rows(path: str | Path) -> list[tuple[Row, str]]:
    """Read the rows of a file, each with its location for error messages."""
    dataset = load_rows(str(Path(path).expanduser().resolve()), split="train")
    return rows_of(dataset[:], range(len(dataset)), Path(path).name)


def cell(row: Row, key: str, where: str, kind: type = str) -> Any:
    """Return a cell, which must exist and be of type ``kind`` (str or list); otherwise raises :class:`SimpoError`."""
    if key not in row:
        raise SimpoError(f"{where}: no {key!r}; the row has {', '.join(sorted(row)) or 'no columns'}")
    if not isinstance(row[key], kind):
        expected = "text" if kind is str else "a list"
        raise SimpoError(f"{where}: {key}: expected {expected}, got {row[key]!r:.60}")
    return row[key]


def read_by_key(
    path: str | Path, key_name: str, parse: Callable[[Row, str], tuple[Any, T]]
) -> dict[Any, tuple[T, str]]:
    """Read a file into a mapping from each row's key to its value and location, in file order.

    ``parse`` takes a row and its location and returns the key and the value. Duplicate keys raise :class:`SimpoError`;
    ``key_name`` is what the message calls the key.
    """
    values: dict[Any, tuple[T, str]] = {}
    for row, where in read_rows(path):
        key, value = parse(row, where)
        if key in values:
            raise SimpoError(f"{where}: {key_name} {str(key)!r:.80} occurs twice, first at {values[key][1]}")
        values[key] = value, where
    return values


def read_answers(
    path: str | Path, key_name: str, parse: Callable[[Row, str], tuple[Any, T]], questions: Mapping[Any, str]
) -> list[T]:
    """Read the answers to the given questions, in the order of the questions.

    ``questions`` maps every question's key to its location; for the other arguments see :func:`read_by_key`. Raises
    :class:`SimpoError` if a question has no answer or an answer has no question.
    """
    answers = read_by_key(path, key_name, parse)
    unknown = [key for key in answers if key not in questions]
    if unknown:
        raise SimpoError(
            f"{answers[unknown[0]][1]}: {len(unknown)} of {len(answers)} answers are to questions that are not in the "
            f"benchmark; the first has {key_name} {str(unknown[0])!r:.80}"
        )
    missing = [key for key in questions if key not in answers]
    if missing:
        raise SimpoError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answer; the first is "
            f"{questions[missing[0]]} ({key_name} {str(missing[0])!r:.80})"
        )
    return [answers[key][0] for key in questions]


def answers_path(name: str) -> Path:
    """Resolve a command's argument to a file of answers; a ``simpo sample`` run folder stands for its file."""
    path = Path(name).expanduser()
    return path / FILE_NAME if (path / FILE_NAME).is_file() else path


def is_answer_file(name: str) -> bool:
    """Whether a command's argument is a file of answers rather than a model."""
    return name.endswith(SUFFIXES)


def read_answer_file(path: Path) -> dict[str, Record]:
    """Read prompts with their answers, keyed by prompt id, in file order.

    Rows are ``{id, prompt, responses, ...}`` as written by ``simpo sample``, or AlpacaEval's ``{instruction, output}``.
    Answers may be empty.
    """
    return {key: record for key, (record, _) in read_by_key(path, "prompt", _record).items()}


def _record(row: Row, where: str) -> tuple[str, Record]:
    if "instruction" in row and "output" in row:
        instruction, output = cell(row, "instruction", where), cell(row, "output", where)
        key = prompt_id(instruction)
        return key, {"id": key, "prompt": instruction, "responses": [output]}
    if isinstance(row.get("prompt"), dict):  # a single message
        row = row | {"prompt": [row["prompt"]]}
    prompt = checked_prompt(row, where)
    return row["id"], row | {"prompt": prompt}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON array, or JSON lines if the name ends in ``.jsonl``."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    # UTF-8 cannot encode a lone surrogate, so it is written as JSON's own \udXXX.
    write_text(path, text.encode("utf-8", "backslashreplace").decode())


# ---- Questions and answers of benchmarks.


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question."""

    model: str
    turns: tuple[str, ...]  # one text per turn
    tokens: int | None = None  # length under the benchmark's tokenizer; None if unknown

    @property
    def text(self) -> str:
        """The first turn, for single-turn benchmarks."""
        return self.turns[0]

    def for_judge(self, thinking_filter: ThinkingFilter) -> Answer:
        """Return the answer as the judge sees it; if this changes the text, ``tokens`` becomes None."""
        turns = tuple(thinking_filter(text) for text in self.turns)
        return self if turns == self.turns else replace(self, turns=turns, tokens=None)


@dataclass(frozen=True)
class Question:
    """A benchmark question."""

    key: Any  # unique within the benchmark
    turns: tuple[str, ...]  # the user's message in every turn
    where: str  # location in a file, for error messages
    category: str | None = None
    reference: Answer | None = None  # the baseline's answer or a correct one, for the judge to compare with

    @property
    def baseline(self) -> Answer:
        """The baseline's answer, for benchmarks in which every question has one."""
        assert self.reference is not None
        return self.reference


# ---- Sampling answers.


@dataclass(frozen=True)
class Answerer:
    """A model and the settings for sampling its answers."""

    model: ModelArguments
    settings: SamplingSettings
    chat_template: str | None = None  # a template, a file with one, or "none"; None uses the model's own
    engine: EngineName = "transformers"
    rendering: RenderSettings = field(default_factory=RenderSettings)

    @property
    def name(self) -> str:
        """The model's name in results: the last component of its path."""
        return Path(self.model.model_name_or_path).name

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of an answer in tokens."""
        resolved = self.settings.resolved(context=Checkpoint.read(self.model).context, chunk_size=1)
        assert resolved.max_new_tokens is not None
        return resolved.max_new_tokens

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the answers: weights, template and settings."""
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
        """Return a dummy answer of maximum length, to estimate the cost of judging; texts differ by ``name``."""
        return placeholder_answer(self.max_new_tokens, name)

    def prompts_that_fit(self, source: PromptArguments) -> Prompts:
        """Return the prompts that leave room for an answer in the model's context."""
        return Job.prepare(self.model, source, self.settings, self.engine, lambda line: None).prompts

    def answer(
        self, questions: Sequence[str | list[dict[str, str]]], folder: Path, *, temperature: float | None = None
    ) -> list[str]:
        """Sample one answer per text or conversation, in the same order; duplicates are answered once.

        ``folder`` is the folder of the sampling run, which is resumed if it was interrupted; ``temperature`` overrides
        the settings'. Raises :class:`SimpoError` before sampling if a question does not fit the context.
        """
        prompts = folder.with_name(f"{folder.name}-questions.jsonl")
        prompts.parent.mkdir(parents=True, exist_ok=True)
        write_text(prompts, "".join(json.dumps({"prompt": question}) + "\n" for question in questions))
        source = PromptArguments(str(prompts), chat_template=self.chat_template, rendering=self.rendering)
        fitting = {_key(prompt.content) for prompt in self.prompts_that_fit(source)}
        too_long = [question for question in questions if _key(question) not in fitting]
        if too_long:
            raise SimpoError(
                f"{self.model.model_name_or_path}: {len(too_long)} of {len(questions)} questions leave no room in the "
                f"context for an answer of {self.max_new_tokens:,} tokens; set a smaller max_new_tokens; the first is "
                f"{str(too_long[0])!r:.80}"
            )
        settings = self.settings
        if temperature is not None:
            settings = dataclasses.replace(settings, temperature=temperature)
        sample_responses(self.model, source, settings, folder, engine=self.engine)
        free_memory()
        by_question = {_key(record["prompt"]): record["responses"][0] for record in read_lines(folder / FILE_NAME)}
        return [by_question[_key(question)] for question in questions]


def _key(question: object) -> str:
    return json.dumps(question, sort_keys=True)
