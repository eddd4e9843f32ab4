"""MT-Bench's files (questions, answers, references, judgments), and the ratings in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simpo.data.rows import Row
from simpo.errors import SimpoError
from simpo.evaluation.rows import check_same, check_unique, list_in, read_rows, text_in, write_json_lines
from simpo.generation.thinking import after_thinking
from simpo.runs.results import Metric
from simpo.statistics import Interval, mean_interval, weighted_mean_interval

# ---- Ratings in a judge's words, and their means.


_MARKED = re.compile(r"\[\[(\d+\.?\d*)\]\]")


_LOOSELY_MARKED = re.compile(r"\[(\d+\.?\d*)\]")


_BEST = 10


@dataclass(frozen=True)
class Rating:
    """What the judge gave a turn; ``score`` is None where it gave nothing."""

    question_id: int
    category: str
    turn: int
    score: float | None


def read_rating(text: str) -> float | None:
    """The first number in double brackets or, where there is none, in single ones; None without either.

    A number above 10 is no rating: single brackets also hold years and references. Numbers in the judge's thinking do
    not count.
    """
    text = after_thinking(text) or ""
    found = _MARKED.search(text) or _LOOSELY_MARKED.search(text)
    return float(found[1]) if found and float(found[1]) <= _BEST else None


def rating_metrics(ratings: Sequence[Rating]) -> list[Metric]:
    """Means by turn and by category, and the pooled mean of all turns.

    Turns of one conversation are not independent: in pooled means a conversation is one observation.
    """
    rated = [rating for rating in ratings if rating.score is not None]
    metrics = [Metric.of("mt_bench/average", _pooled(rated)) if rated else Metric("mt_bench/average", None, n=0)]
    for turn in sorted({rating.turn for rating in rated}):
        scores = [rating.score for rating in rated if rating.turn == turn and rating.score is not None]
        metrics.append(Metric.of(f"mt_bench/turn_{turn}", mean_interval(scores)))
    for category in dict.fromkeys(rating.category for rating in rated):
        own = [rating for rating in rated if rating.category == category]
        metrics.append(Metric.of(f"mt_bench/{category}", _pooled(own)))
    return [*metrics, Metric("mt_bench/without_rating", len(ratings) - len(rated), n=len(ratings))]


def _pooled(ratings: Sequence[Rating]) -> Interval:
    scores: dict[int, list[float]] = {}
    for rating in ratings:
        if rating.score is not None:
            scores.setdefault(rating.question_id, []).append(rating.score)
    means = [sum(found) / len(found) for found in scores.values()]
    return weighted_mean_interval(means, [len(found) for found in scores.values()])


TURNS = 2


# Categories whose answers are right or wrong: the judge is shown a reference.
REFERENCED = ("math", "reasoning", "coding")


# What is said in the two turns of a conversation, on one side.
Turns = tuple[str, str]


@dataclass(frozen=True)
class Question:
    """A conversation of the benchmark.

    Attributes:
        question_id: its number.
        category: one of eight.
        turns: what the user says.
        reference: right answers to both turns, where there are any.
        where: where it stands.
    """

    question_id: int
    category: str
    turns: Turns
    reference: Turns | None
    where: str


def read_questions(path: str | Path, references: str | Path | None) -> list[Question]:
    """Questions ``{question_id, category, turns, reference}``; references count in :data:`REFERENCED` only.

    Args:
        path: file of the questions.
        references: file of reference answers in the form of :func:`read_answers`, which count instead of the
            questions' own.

    Raises:
        SimpoError: a file cannot be read, a question occurs twice, or a reference is to none of them.
    """
    rows = read_rows(path)
    check_unique(((_number(row, where), where) for row, where in rows), "question_id")
    found = None if references is None else {number: turns for number, turns, _ in _answers(references)}
    questions = [_question(row, where, found) for row, where in rows]
    strange = (found or {}).keys() - {question.question_id for question in questions}
    if strange:
        raise SimpoError(f"{references}: {len(strange)} references are to other questions, the first to {min(strange)}")
    return questions


def _question(row: Row, where: str, references: dict[int, Turns] | None) -> Question:
    number, category = _number(row, where), text_in(row, "category", where)
    reference: Turns | None = None
    if category in REFERENCED and references is not None:
        reference = references.get(number)
    elif category in REFERENCED and row.get("reference"):
        reference = _two(list_in(row, "reference", where), f"{where}: reference")
    return Question(number, category, _two(list_in(row, "turns", where), f"{where}: turns"), reference, where)


def _number(row: Row, where: str) -> int:
    number = row.get("question_id")
    if not isinstance(number, int):
        raise SimpoError(f"{where}: question_id: expected a whole number, got {number!r:.60}")
    return number


def _two(texts: Sequence[object], where: str) -> Turns:
    if len(texts) != TURNS or not all(isinstance(text, str) for text in texts):
        raise SimpoError(f"{where}: expected {TURNS} texts, got {len(texts)} of {texts!r:.60}")
    first, second = texts
    return str(first), str(second)


def read_answers(path: str | Path, questions: Sequence[Question]) -> tuple[str, list[Turns]]:
    """The model's name and its answers ``{question_id, model_id, choices: [{turns}]}`` in the questions' order.

    Raises:
        SimpoError: the file cannot be read, or does not hold one answer to each of the questions and no other.
    """
    answers = _answers(path)
    found = {number: turns for number, turns, _ in answers}
    expected = {question.question_id: question.where for question in questions}
    check_same(expected, {number: where for number, _, where in answers}, "question_id", str(path))
    model = str(read_rows(path)[0][0].get("model_id") or "model")
    return model, [found[question.question_id] for question in questions]


def _answers(path: str | Path) -> list[tuple[int, Turns, str]]:
    found = []
    for row, where in read_rows(path):
        choices = list_in(row, "choices", where)
        if not choices or not isinstance(choices[0], dict):
            raise SimpoError(f"{where}: choices: expected a list with an answer, got {choices!r:.60}")
        found.append((_number(row, where), _two(list_in(choices[0], "turns", where), f"{where}: turns"), where))
    check_unique(((number, where) for number, _, where in found), "question_id")
    return found


def write_answers(path: Path, questions: Sequence[Question], model: str, answers: Sequence[Turns]) -> None:
    """Write answers as ``{question_id, model_id, choices}`` lines."""
    rows = [
        {
            "question_id": question.question_id,
            "model_id": model,
            "choices": [{"index": 0, "turns": list(turns)}],
        }
        for question, turns in zip(questions, answers, strict=True)
    ]
    write_json_lines(path, rows)


def write_judgments(path: Path, model: str, judge: str, ratings: Sequence[Rating], texts: Sequence[str]) -> None:
    """Write judgments as ``{question_id, model, judge, judgment, score, turn}`` lines; -1 is no score."""
    rows = [
        {
            "question_id": rating.question_id,
            "model": model,
            "judge": judge,
            "judgment": text,
            "score": -1 if rating.score is None else rating.score,
            "turn": rating.turn,
        }
        for rating, text in zip(ratings, texts, strict=True)
    ]
    write_json_lines(path, rows)
