"""The workflow behind ``simpo evaluate mt_bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.client import ChatRequest
from simpo.evaluation.answers import Answerer
from simpo.evaluation.answers import Question as Asked
from simpo.evaluation.asking import ApiJudge, Say
from simpo.evaluation.mt_bench.files import (
    REFERENCED,
    TURNS,
    Question,
    Turns,
    read_answers,
    read_questions,
    write_answers,
    write_judgments,
)
from simpo.evaluation.mt_bench.judge import RatingPrompts
from simpo.evaluation.mt_bench.ratings import Rating, rating_metrics, read_rating
from simpo.evaluation.once import measure_once
from simpo.evaluation.rows import file_digest
from simpo.judges.shown import Shown
from simpo.results import Metric
from simpo.runs.folder import RunFolder

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

    def rate(self, questions: Sequence[Question], answers: Sequence[Turns], say: Say) -> tuple[list[Rating], list[str]]:
        """A rating of each turn of each conversation, and what the judge wrote.

        Raises:
            SimpoError: the judge cannot be asked.
        """
        replies = self.judge.ask(self.requests(questions, answers), say)
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
        run.begin(benchmark.identity() | identity, argv=argv, accept_changes=None)

        def measure() -> list[Metric]:
            _say_missing_references(questions, run.say)
            if isinstance(answers, Answerer):
                model, turns = answers.name, _sampled(benchmark, questions, answers, run, own_temperature)
            else:
                assert ready is not None
                model, turns = ready
            write_answers(folder / ANSWERS, questions, model, turns)
            show = Shown(benchmark.judge.strip_thinking)
            shown = [(show(first), show(second)) for first, second in turns]
            thinking = show.metrics("mt_bench/", run.say)
            ratings, texts = benchmark.rate(questions, shown, run.say)
            write_judgments(folder / JUDGMENTS, model, benchmark.judge.name, ratings, texts)
            return figures(ratings, run.say) + thinking + benchmark.judge.metrics("mt_bench")

        return measure_once(run, measure)


def _say_missing_references(questions: Sequence[Question], say: Say) -> None:
    wanted = [question for question in questions if question.category in REFERENCED]
    missing = sum(question.reference is None for question in wanted)
    if missing:
        say(f"note: {missing} of {len(wanted)} questions of {', '.join(REFERENCED)} have no reference answer")


def figures(ratings: Sequence[Rating], say: Say) -> list[Metric]:
    """Averages, and how many turns got no rating."""
    missing = sum(rating.score is None for rating in ratings)
    if missing:
        say(f"note: {missing} of {len(ratings)} turns got no rating and are left out")
    return rating_metrics(ratings)


def _sampled(
    benchmark: MTBench, questions: Sequence[Question], answerer: Answerer, run: RunFolder, own_temperature: bool
) -> list[Turns]:
    """Both turns, once the user has agreed; the second is asked with the first and its answer before it."""
    if not (run.path / ANSWERS).exists():
        longest = answerer.stand_in()
        benchmark.judge.agree_beforehand(benchmark.requests(questions, [(longest, longest)] * len(questions)), run.say)
    show = Shown(benchmark.judge.strip_thinking)
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
