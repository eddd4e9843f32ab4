"""``simpo evaluate mt_bench``: answers, judge, metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from simpo.client import ChatRequest
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answerer, ApiJudge
from simpo.evaluation.answers import Question as Asked
from simpo.evaluation.mt_bench.files import (
    REFERENCED,
    TURNS,
    Question,
    Rating,
    Turns,
    rating_metrics,
    read_answers,
    read_questions,
    read_rating,
    write_answers,
    write_judgments,
)
from simpo.evaluation.rows import file_digest, text_in
from simpo.judging.presentation import ShownAnswers, fill, read_prompt_file
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import Metric

# ---- What MT-Bench's judge is asked about a turn.


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


ANSWERS, JUDGMENTS = "model_answer.jsonl", "model_judgment.jsonl"


# The benchmark's temperatures; other categories have the first.
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


@dataclass(frozen=True)
class MTBench:
    """The benchmark with a judge.

    Attributes:
        judge: rates the answers.
        prompts: what it is asked.
        questions: file of the questions.
        references: file of reference answers instead of the questions' own.
    """

    judge: ApiJudge
    prompts: RatingPrompts
    questions: Path
    references: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What determines the ratings of given answers."""
        return {
            "benchmark": "mt_bench",
            "questions": file_digest(self.questions),
            "references": None if self.references is None else file_digest(self.references),
            **self.judge.identity,
            "judge_prompt": self.prompts.digest,
        }

    def requests(self, questions: Sequence[Question], answers: Sequence[Turns]) -> list[ChatRequest]:
        """What the judge is asked, turn by turn, conversation by conversation."""
        return [
            self.prompts.request(question, given, turn)
            for question, given in zip(questions, answers, strict=True)
            for turn in range(1, TURNS + 1)
        ]

    def rate(self, questions: Sequence[Question], answers: Sequence[Turns], log: Log) -> tuple[list[Rating], list[str]]:
        """A rating of each turn of each conversation, and what the judge wrote.

        Raises:
            SimpoError: the judge cannot be asked.
        """
        replies = self.judge.ask(self.requests(questions, answers), log)
        turns = [(question, turn) for question in questions for turn in range(1, TURNS + 1)]
        ratings = [
            Rating(question.question_id, question.category, turn, read_rating(reply.whole_text))
            for (question, turn), reply in zip(turns, replies, strict=True)
        ]
        return ratings, [reply.text for reply in replies]


def evaluate_mt_bench(
    benchmark: MTBench,
    answers: Answerer | Path,
    folder: Path,
    *,
    own_temperature: bool = False,
    argv: Sequence[str] = (),
) -> Path:
    """Answer both turns, rate and average; a run that was stopped is continued by the same call.

    Args:
        benchmark: with its judge.
        answers: a model, or a file of its answers in the benchmark's form.
        folder: the run's; gets ``model_answer.jsonl``, ``model_judgment.jsonl`` and ``results.json``.
        own_temperature: answer at the temperature of the settings instead of the categories'.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: something that the user gave cannot be used, or a request finally failed.
    """
    with RunFolder(folder, command="evaluate") as run:
        questions = read_questions(benchmark.questions, benchmark.references)
        if isinstance(answers, Path):
            ready, identity = read_answers(answers, questions), {"outputs": file_digest(answers)}
        else:
            ready, identity = None, answers.identity() | {"own_temperature": own_temperature}
        run.begin(benchmark.identity() | identity, argv=argv)

        def measure() -> list[Metric]:
            _say_missing_references(questions, run.log)
            if isinstance(answers, Answerer):
                model, turns = answers.name, _sampled(benchmark, questions, answers, run, own_temperature)
            else:
                assert ready is not None
                model, turns = ready
            write_answers(folder / ANSWERS, questions, model, turns)
            show = ShownAnswers(benchmark.judge.strip_thinking)
            shown = [(show(first), show(second)) for first, second in turns]
            thinking = show.metrics("mt_bench/", run.log)
            ratings, texts = benchmark.rate(questions, shown, run.log)
            write_judgments(folder / JUDGMENTS, model, benchmark.judge.name, ratings, texts)
            return figures(ratings, run.log) + thinking + benchmark.judge.metrics("mt_bench")

        return run.complete(measure)


def _say_missing_references(questions: Sequence[Question], log: Log) -> None:
    wanted = [question for question in questions if question.category in REFERENCED]
    missing = sum(question.reference is None for question in wanted)
    if missing:
        log(f"note: {missing} of {len(wanted)} questions of {', '.join(REFERENCED)} have no reference answer")


def figures(ratings: Sequence[Rating], log: Log) -> list[Metric]:
    """Averages, and how many turns got no rating."""
    missing = sum(rating.score is None for rating in ratings)
    if missing:
        log(f"note: {missing} of {len(ratings)} turns got no rating and are left out")
    return rating_metrics(ratings)


def _sampled(
    benchmark: MTBench, questions: Sequence[Question], answerer: Answerer, run: RunFolder, own_temperature: bool
) -> list[Turns]:
    """Both turns, once the user has agreed; the second is asked with the first and its answer before it."""
    if not (run.path / ANSWERS).exists():
        longest = answerer.stand_in()
        benchmark.judge.agree_beforehand(benchmark.requests(questions, [(longest, longest)] * len(questions)), run.log)
    show = ShownAnswers(benchmark.judge.strip_thinking)
    temperatures = [None if own_temperature else _TEMPERATURES.get(question.category, 0.7) for question in questions]
    asked: list[Asked] = [[{"role": "user", "content": question.turns[0]}] for question in questions]
    first = _answered(asked, temperatures, answerer, run.path / "answers" / "turn-1")
    asked = [
        [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": show(answer)},
            {"role": "user", "content": question.turns[1]},
        ]
        for question, answer in zip(questions, first, strict=True)
    ]
    second = _answered(asked, temperatures, answerer, run.path / "answers" / "turn-2")
    return list(zip(first, second, strict=True))


def _answered(
    asked: Sequence[Asked], temperatures: Sequence[float | None], answerer: Answerer, folder: Path
) -> list[str]:
    """Answers at temperatures of their own, a sampling run for each."""
    found: dict[int, str] = {}
    for temperature in dict.fromkeys(temperatures):
        places = [place for place, other in enumerate(temperatures) if other == temperature]
        name = folder.with_name(f"{folder.name}-at-{temperature}") if temperature is not None else folder
        texts = answerer.answer([asked[place] for place in places], name, temperature=temperature)
        found |= dict(zip(places, texts, strict=True))
    return [found[place] for place in range(len(asked))]
