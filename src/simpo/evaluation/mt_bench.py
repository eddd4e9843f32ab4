"""MT-Bench: a judge rates both turns of 80 conversations from 1 to 10."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from simpo.client import ChatRequest
from simpo.config import required, setting
from simpo.data.rows import Row
from simpo.errors import SimpoError, third_party
from simpo.evaluation.answers import Answer, Answerer, Question, cell, read_by_key, write_rows
from simpo.evaluation.runner import JudgedBenchmark, JudgedSettings
from simpo.generation.responses import after_thinking
from simpo.generation.settings import SamplingSettings
from simpo.judging.protocol import ThinkingFilter, fill, read_prompt_file
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.manifest import file_digest
from simpo.runs.results import Metric
from simpo.statistics import mean_interval

_TURNS = (1, 2)
REFERENCED = ("math", "reasoning", "coding")  # categories for which the judge sees a reference answer
# The benchmark's temperatures; other categories use 0.7.
_TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


@dataclass(kw_only=True)
class MTBenchSettings(JudgedSettings):
    """MT-Bench for a model or a file of its answers.

    examples:
      simpo evaluate mt_bench outputs/simpo --questions question.jsonl --judge_url https://api.openai.com/v1 \\
          --judge_model gpt-4 --output_dir outputs/mt_bench
      simpo evaluate mt_bench recipe.yaml --judge_concurrency 16
    """

    questions: Path = required("The benchmark's question.jsonl.")
    references: Path | None = setting(None, "File with reference answers, to replace those in the questions.")
    temperature: float | None = setting(None, "Sampling temperature (default: 0, 0.1 or 0.7, by category).")
    sampling: SamplingSettings = field(
        default=SamplingSettings(temperature=0.7, top_p=1.0, max_new_tokens=1024),
        metadata={"without": ("n", "top_k", "temperature")},
    )

    def answerer(self, model: str) -> Answerer:
        """Return the answerer for a model, with the ``temperature`` if one is given."""
        answerer = super().answerer(model)
        if self.temperature is None:
            return answerer
        return replace(answerer, settings=replace(self.sampling, temperature=self.temperature))

    def benchmark(self, log: Log) -> MTBench:
        """Prepare the benchmark; raises :class:`SimpoError` if a file is unusable."""
        return MTBench(self, log)


class MTBench(JudgedBenchmark):
    """Has a judge rate every turn separately."""

    name = "mt_bench"
    key_name = "question_id"
    answer_file = "model_answer.jsonl"
    compares = False
    settings: MTBenchSettings

    def __init__(self, settings: MTBenchSettings, log: Log) -> None:
        self._prompts = RatingPrompts(settings.api.judge_prompt)
        questions = read_questions(settings.questions, settings.references)
        wanted = [question for question in questions if question.category in REFERENCED]
        if missing := sum(question.reference is None for question in wanted):
            log(f"note: {missing} of {len(wanted)} questions in {', '.join(REFERENCED)} have no reference answer")
        super().__init__(settings, questions, self._prompts.digest)

    def extra_identity(self) -> dict[str, Any]:
        """Return the benchmark's files, and whether the user set the temperature."""
        settings = self.settings
        identity = {
            "benchmark": self.name,
            "questions": file_digest(settings.questions),
            "references": None if settings.references is None else file_digest(settings.references),
        }
        return identity if self.answerer is None else identity | {"own_temperature": settings.temperature is not None}

    @classmethod
    def parse_answer(cls, row: Row, where: str) -> tuple[int, Answer]:
        """Parse a row ``{question_id, model_id, choices: [{turns}]}``."""
        choices = cell(row, "choices", where, list)
        if not choices or not isinstance(choices[0], dict):
            raise SimpoError(f"{where}: choices: expected a list with an answer, got {choices!r:.60}")
        turns = _two_turns(choices[0], "turns", where)
        return _number(row, where), Answer(str(row.get("model_id") or "model"), turns)

    @classmethod
    def answer_row(cls, question: Question, answer: Answer) -> Row:
        """Return a row ``{question_id, model_id, choices: [{turns}]}``."""
        choices = [{"index": 0, "turns": list(answer.turns)}]
        return {"question_id": question.key, "model_id": answer.model, "choices": choices}

    def sample(self, answerer: Answerer, folder: Path) -> list[tuple[str, ...]]:
        """Sample both turns; the second is sampled with the first and its answer as context."""
        thinking_filter = ThinkingFilter(self.settings.api.strip_thinking)
        conversations = [[{"role": "user", "content": question.turns[0]}] for question in self.questions]
        first = self._sample_turn(answerer, conversations, folder / "turn-1")
        for conversation, question, answer in zip(conversations, self.questions, first, strict=True):
            conversation.append({"role": "assistant", "content": thinking_filter(answer)})
            conversation.append({"role": "user", "content": question.turns[1]})
        second = self._sample_turn(answerer, conversations, folder / "turn-2")
        return list(zip(first, second, strict=True))

    def _sample_turn(
        self, answerer: Answerer, conversations: Sequence[list[dict[str, str]]], folder: Path
    ) -> list[str]:
        """Sample one turn, in a separate sampling run for each of the categories' temperatures."""
        if self.settings.temperature is not None:
            return answerer.answer(conversations, folder)
        temperatures = [_TEMPERATURES.get(str(question.category), 0.7) for question in self.questions]
        answers = [""] * len(conversations)
        for temperature in dict.fromkeys(temperatures):
            indices = [index for index, other in enumerate(temperatures) if other == temperature]
            run = folder.with_name(f"{folder.name}-at-{temperature}")
            texts = answerer.answer([conversations[index] for index in indices], run, temperature=temperature)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
        return answers

    def requests(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[ChatRequest]:
        """Build one request per turn of every conversation."""
        return [
            self._prompts.request(question, answer, turn)
            for question, answer in zip(questions, answers, strict=True)
            for turn in _TURNS
        ]

    def read_judgments(
        self, questions: Sequence[Question], answers: Sequence[Answer], replies: Sequence[Any], run: RunFolder
    ) -> list[Metric]:
        """Read ratings, write ``model_judgment.jsonl`` (a missing score is -1), and compute averages."""
        judged = [
            (question, answer, turn) for question, answer in zip(questions, answers, strict=True) for turn in _TURNS
        ]
        ratings, rows = [], []
        for (question, answer, turn), reply in zip(judged, replies, strict=True):
            score = read_rating(reply.complete_text)
            ratings.append(Rating(question.key, str(question.category), turn, score))
            rows.append(
                {
                    "question_id": question.key,
                    "model": answer.model,
                    "judge": self.judge_name,
                    "judgment": reply.text,
                    "score": -1 if score is None else score,
                    "turn": turn,
                }
            )
        write_rows(run.path / "model_judgment.jsonl", rows)
        return rating_metrics(ratings, run.log)


# ---- The judge's prompts.

# Whether there is a reference, and the turn -> name of the prompt and the placeholders it needs.
_PROMPTS = {
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

    If ``path`` is None, the built-in prompts are used.
    """

    def __init__(self, path: Path | None) -> None:
        shipped = resources.files("simpo.evaluation") / "prompts" / "mt_bench.jsonl"
        text, self.digest = read_prompt_file(path, shipped, ())
        with third_party(f"{path}: not MT-Bench judge prompts"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            named = {cell(row, "name", f"{path}"): row for row in rows}
        self._prompts = {
            name: tuple(cell(row, key, f"{path}: {name}") for key in ("system_prompt", "prompt_template"))
            for name, row in named.items()
        }
        for name, placeholders in _PROMPTS.values():
            for placeholder in placeholders:
                if f"{{{placeholder}}}" not in self._prompts.get(name, ("", ""))[1]:
                    raise SimpoError(f"{path}: the judge prompt {name} is missing or lacks {{{placeholder}}}")

    def request(self, question: Question, answer: Answer, turn: int) -> ChatRequest:
        """Build the request to rate turn 1, or turn 2 with the first turn as context."""
        values = {"question": question.turns[0], "answer": answer.turns[0]}
        for number in range(len(_TURNS)):
            values[f"question_{number + 1}"] = question.turns[number]
            values[f"answer_{number + 1}"] = answer.turns[number]
            if question.reference is not None:
                values[f"ref_answer_{number + 1}"] = question.reference.turns[number]
        system, template = self._prompts[_PROMPTS[question.reference is not None, turn][0]]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": fill(template, values)}]
        return ChatRequest(messages, max_tokens=2048)


# ---- Reading and averaging ratings.

_MARKED = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_LOOSELY_MARKED = re.compile(r"\[(\d+\.?\d*)\]")
_BEST = 10


@dataclass(frozen=True)
class Rating:
    """The judge's rating of a turn; ``score`` is None if it gave none."""

    question_id: int
    category: str
    turn: int
    score: float | None


def read_rating(text: str) -> float | None:
    """Return the first number in double brackets, else in single brackets, or None.

    Numbers above 10 are not ratings, since single brackets also hold years and references. Numbers in the judge's
    thinking do not count.
    """
    text = after_thinking(text) or ""
    match = _MARKED.search(text) or _LOOSELY_MARKED.search(text)
    return float(match[1]) if match and float(match[1]) <= _BEST else None


def rating_metrics(ratings: Sequence[Rating], log: Log) -> list[Metric]:
    """Compute mean ratings by turn, by category and over all turns.

    Turns of a conversation are not independent, so means over both turns treat a conversation as one observation.
    """
    rated = [rating for rating in ratings if rating.score is not None]
    missing = len(ratings) - len(rated)
    if missing:
        log(f"note: {missing} of {len(ratings)} turns have no rating and do not count")
    metrics = [_pooled("average", rated) if rated else Metric("mt_bench/average", None, n=0)]
    for turn in sorted({rating.turn for rating in rated}):
        scores = [rating.score for rating in rated if rating.turn == turn and rating.score is not None]
        metrics.append(Metric.of(f"mt_bench/turn_{turn}", mean_interval(scores)))
    for category in dict.fromkeys(rating.category for rating in rated):
        metrics.append(_pooled(category, [rating for rating in rated if rating.category == category]))
    return [*metrics, Metric("mt_bench/without_rating", missing, n=len(ratings))]


def _pooled(name: str, ratings: Sequence[Rating]) -> Metric:
    scores: dict[int, list[float]] = {}
    for rating in ratings:
        if rating.score is not None:
            scores.setdefault(rating.question_id, []).append(rating.score)
    means = [sum(of_question) / len(of_question) for of_question in scores.values()]
    return Metric.of(f"mt_bench/{name}", mean_interval(means, [len(of_question) for of_question in scores.values()]))


# ---- Files.


def read_questions(path: Path, references: Path | None) -> list[Question]:
    """Read questions ``{question_id, category, turns, reference}``; only :data:`REFERENCED` ones use the reference.

    A file of ``references``, in the format of model answers, replaces the references in the questions.
    """

    def parse(row: Row, where: str) -> tuple[int, Question]:
        number, category = _number(row, where), cell(row, "category", where)
        reference = None
        if category in REFERENCED and references is None and row.get("reference"):
            reference = Answer("reference", _two_turns(row, "reference", where))
        return number, Question(number, _two_turns(row, "turns", where), where, category, reference)

    questions = [question for question, _ in read_by_key(path, "question_id", parse).values()]
    if references is None:
        return questions
    by_number = {
        number: answer for number, (answer, _) in read_by_key(references, "question_id", MTBench.parse_answer).items()
    }
    unknown = by_number.keys() - {question.key for question in questions}
    if unknown:
        raise SimpoError(f"{references}: {len(unknown)} references are for unknown questions, such as {min(unknown)}")
    return [
        replace(question, reference=by_number.get(question.key)) if question.category in REFERENCED else question
        for question in questions
    ]


def _number(row: Row, where: str) -> int:
    number = row.get("question_id")
    if not isinstance(number, int):
        raise SimpoError(f"{where}: question_id: expected a whole number, got {number!r:.60}")
    return number


def _two_turns(row: Row, key: str, where: str) -> tuple[str, ...]:
    texts = cell(row, key, where, list)
    if len(texts) != len(_TURNS) or not all(isinstance(text, str) for text in texts):
        raise SimpoError(f"{where}: {key}: expected {len(_TURNS)} texts, got {len(texts)}: {texts!r:.60}")
    return tuple(texts)
