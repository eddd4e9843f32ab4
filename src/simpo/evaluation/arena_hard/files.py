"""The benchmark's files: questions, answers, judgments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simpo.data.rows import Row
from simpo.errors import SimpoError
from simpo.evaluation.arena_hard.scores import Version
from simpo.evaluation.rows import check_same, check_unique, list_in, read_rows, text_in, write_json_lines

V01 = "arena-hard-v0.1"  # its one category
_V2 = "o3-mini-2025-01-31"
# Whom a question's category is played against.
BASELINES = {
    V01: "gpt-4-0314",
    "hard_prompt": _V2,
    "coding": _V2,
    "math": _V2,
    "creative_writing": "gemini-2.0-flash-001",
}


@dataclass(frozen=True)
class Question:
    """A prompt of the benchmark, and where it stands."""

    uid: str
    category: str
    prompt: str
    where: str


@dataclass(frozen=True)
class Answer:
    """An answer to a question; ``tokens`` is its length by the benchmark's tokenizer where the file has it."""

    uid: str
    model: str
    text: str
    tokens: int | None
    where: str


@dataclass(frozen=True)
class Judgment:
    """The two games of a question, as the benchmark's files have them.

    Attributes:
        question: what was asked.
        model: who answered.
        baseline: against whom.
        judge: who judged.
        texts: what the judge wrote; the baseline is shown first in the first game, the model in the second.
        verdicts: what that means; None where it is no verdict.
    """

    question: Question
    model: str
    baseline: str
    judge: str
    texts: tuple[str, str]
    verdicts: tuple[str | None, str | None]


def read_questions(path: str | Path, version: Version) -> list[Question]:
    """Questions ``{uid, category, prompt}``, or v0.1's earlier ``{question_id, category, turns: [{content}]}``.

    Raises:
        SimpoError: the file cannot be read, a uid occurs twice, or it is of the other version.
    """
    questions = [_question(row, where, version) for row, where in read_rows(path)]
    check_unique(((question.uid, question.where) for question in questions), "uid")
    return questions


def _question(row: Row, where: str, version: Version) -> Question:
    category = text_in(row, "category", where)
    of = "v0.1" if category == V01 else "v2"
    if of != version:
        raise SimpoError(f"{where}: category {category!r} is one of {of}, not of {version}; give --version {of}")
    return Question(_uid(row, where), category, _prompt(row, where), where)


def _prompt(row: Row, where: str) -> str:
    if "turns" not in row:
        return text_in(row, "prompt", where)
    turns = list_in(row, "turns", where)
    if not turns or not isinstance(turns[0], dict):
        raise SimpoError(f"{where}: turns: expected a list with the user's message, got {turns!r:.60}")
    return text_in(turns[0], "content", f"{where}: turns")


def _uid(row: Row, where: str) -> str:
    return text_in(row, "uid" if "uid" in row else "question_id", where)


def read_answers(path: str | Path, questions: Sequence[Question]) -> dict[str, Answer]:
    """Answers by uid: ``{uid, model, messages}``, or v0.1's earlier ``{question_id, model_id, choices}``.

    Raises:
        SimpoError: the file cannot be read, or does not hold one answer to each of the questions and no other.
    """
    answers = [_answer(row, where) for row, where in read_rows(path)]
    check_unique(((answer.uid, answer.where) for answer in answers), "uid")
    expected = {question.uid: question.where for question in questions}
    check_same(expected, {answer.uid: answer.where for answer in answers}, "uid", str(path))
    return {answer.uid: answer for answer in answers}


def _answer(row: Row, where: str) -> Answer:
    try:
        if "choices" in row:
            turn = row["choices"][0]["turns"][0]
            model, text, tokens = text_in(row, "model_id", where), turn["content"], turn.get("token_len")
        else:
            content = row["messages"][-1]["content"]
            model, text = text_in(row, "model", where), content["answer"] if isinstance(content, dict) else content
            tokens = (row.get("metadata") or {}).get("token_len")
    except (KeyError, IndexError, TypeError) as error:
        raise SimpoError(
            f"{where}: not an answer of the benchmark ({type(error).__name__}: {error}): it has uid, model and messages"
        ) from error
    if not isinstance(text, str):
        raise SimpoError(f"{where}: answer: expected text, got {text!r:.60}")
    return Answer(_uid(row, where), model, text, tokens, where)


def write_answers(path: Path, questions: Sequence[Question], model: str, texts: Sequence[str]) -> None:
    """Write answers as ``{uid, model, messages}`` lines."""
    rows = [
        {
            "uid": question.uid,
            "model": model,
            "messages": [
                {"role": "user", "content": question.prompt},
                {"role": "assistant", "content": {"answer": text}},
            ],
        }
        for question, text in zip(questions, texts, strict=True)
    ]
    write_json_lines(path, rows)


def write_judgments(path: Path, judgments: Sequence[Judgment]) -> None:
    """Write judgments as ``{uid, category, judge, model, baseline, games}`` lines."""
    rows = [
        {
            "uid": judgment.question.uid,
            "category": judgment.question.category,
            "judge": judgment.judge,
            "model": judgment.model,
            "baseline": judgment.baseline,
            "games": [
                {"score": verdict, "judgment": {"answer": text}}
                for verdict, text in zip(judgment.verdicts, judgment.texts, strict=True)
            ],
        }
        for judgment in judgments
    ]
    write_json_lines(path, rows)
