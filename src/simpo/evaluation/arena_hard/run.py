"""``simpo evaluate arena_hard``: answers, judge, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from simpo.client import ChatReply, ChatRequest
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answerer, ApiJudge
from simpo.evaluation.arena_hard.figures import Answers, figures
from simpo.evaluation.arena_hard.files import (
    BASELINES,
    Answer,
    Judgment,
    Question,
    read_answers,
    read_questions,
    write_answers,
    write_judgments,
)
from simpo.evaluation.arena_hard.scores import Version, read_verdict
from simpo.evaluation.rows import file_digest
from simpo.judging.presentation import ShownAnswers, fill, read_prompt_file
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import Metric

# ---- What Arena-Hard's judge is asked.


_SHIPPED = resources.files("simpo.evaluation") / "prompts" / "arena_hard.yaml"


_LONGEST: dict[Version, int] = {"v0.1": 4096, "v2": 16000}  # tokens of a judgment


class ArenaPrompt:
    """A judge prompt: YAML with ``system_prompt`` and ``prompt_template``, as the benchmark's settings have them.

    The template has places ``{QUESTION}``, ``{ANSWER_A}`` and ``{ANSWER_B}`` (v2) or ``{question_1}``, ``{answer_1}``
    and ``{answer_2}`` (v0.1). ``system_prompts`` may name other system prompts by category.

    Attributes:
        digest: SHA-256 of the file.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the user's file or, for None, the one that comes with the package.

        Raises:
            SimpoError: it cannot be read, or lacks a part.
        """
        text, self.digest = read_prompt_file(path, _SHIPPED, ())
        settings = _mapping(text, path)
        template = settings.get("prompt_template")
        template = template[0] if isinstance(template, list) and template else template
        system = settings.get("system_prompt")
        if not isinstance(template, str) or not isinstance(system, str):
            raise SimpoError(f"{path}: a judge prompt of Arena-Hard has system_prompt and prompt_template")
        for names in (("QUESTION", "question_1"), ("ANSWER_A", "answer_1"), ("ANSWER_B", "answer_2")):
            if not any(f"{{{name}}}" in template for name in names):
                raise SimpoError(f"{path}: prompt_template has no place {{{names[0]}}}")
        self._template, self._system = template, system
        self._by_category: dict[str, str] = settings.get("system_prompts") or {}
        if not isinstance(self._by_category, dict) or not all(isinstance(x, str) for x in self._by_category.values()):
            raise SimpoError(f"{path}: system_prompts: expected a text for each category")

    def request(self, question: str, category: str, shown: tuple[str, str], version: Version) -> ChatRequest:
        """What the judge is asked about two answers in the order in which they are shown."""
        first, second = shown
        values = {"QUESTION": question, "ANSWER_A": first, "ANSWER_B": second}
        values |= {"question_1": question, "answer_1": first, "answer_2": second}
        messages = [
            {"role": "system", "content": self._by_category.get(category, self._system)},
            {"role": "user", "content": fill(self._template, values)},
        ]
        return ChatRequest(messages, max_tokens=_LONGEST[version])


def _mapping(text: str, where: Path | None) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SimpoError(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise SimpoError(f"{where}: a judge prompt of Arena-Hard has system_prompt and prompt_template")
    return found


ANSWERS, JUDGMENTS = "model_answer.jsonl", "model_judgment.jsonl"


@dataclass(frozen=True)
class ArenaHard:
    """The benchmark with a judge.

    Attributes:
        judge: compares the answers.
        prompt: what it is asked.
        version: of the benchmark.
        questions: file of the questions.
        baselines: files of the baselines' answers.
    """

    judge: ApiJudge
    prompt: ArenaPrompt
    version: Version
    questions: Path
    baselines: Sequence[Path]

    def identity(self) -> dict[str, Any]:
        """What determines the verdicts on given answers."""
        return {
            "benchmark": f"arena_hard {self.version}",
            "questions": file_digest(self.questions),
            "baselines": ", ".join(map(file_digest, self.baselines)),
            **self.judge.identity,
            "judge_prompt": self.prompt.digest,
        }

    def read_baselines(self, questions: Sequence[Question], log: Log) -> Answers:
        """The baseline's answer to each question; by category, if there are several files.

        Raises:
            SimpoError: a file cannot be used, or none is of the baseline of a category.
        """
        if len(self.baselines) == 1:
            found = read_answers(self.baselines[0], questions)
            for category in dict.fromkeys(question.category for question in questions):
                used = {found[question.uid].model for question in questions if question.category == category}
                if used != {BASELINES.get(category)}:
                    log(f"note: the baseline of {category} is {', '.join(sorted(used))}, not the benchmark's")
            return found
        files = [read_answers(path, questions) for path in self.baselines]
        by_model = {answer.model: answers for answers in files for answer in answers.values()}
        missing = {BASELINES.get(question.category, "") for question in questions} - by_model.keys()
        if missing:
            raise SimpoError(f"--baseline: none of the files is of {', '.join(sorted(missing))}")
        return {question.uid: by_model[BASELINES[question.category]][question.uid] for question in questions}

    def requests(self, questions: Sequence[Question], ours: Answers, theirs: Answers) -> list[ChatRequest]:
        """Both games of every question: the baseline's answer first, then the model's."""
        return [
            self.prompt.request(question.prompt, question.category, shown, self.version)
            for question in questions
            for shown in (
                (theirs[question.uid].text, ours[question.uid].text),
                (ours[question.uid].text, theirs[question.uid].text),
            )
        ]

    def play(self, questions: Sequence[Question], ours: Answers, theirs: Answers, log: Log) -> list[Judgment]:
        """Judge both games of every question.

        Raises:
            SimpoError: the judge cannot be asked.
        """
        replies = self.judge.ask(self.requests(questions, ours, theirs), log)
        return [
            self._judgment(question, ours, theirs, replies[2 * index], replies[2 * index + 1])
            for index, question in enumerate(questions)
        ]

    def _judgment(
        self, question: Question, ours: Answers, theirs: Answers, first: ChatReply, second: ChatReply
    ) -> Judgment:
        model, baseline = ours[question.uid].model, theirs[question.uid].model
        verdicts = read_verdict(first.whole_text, self.version), read_verdict(second.whole_text, self.version)
        return Judgment(question, model, baseline, self.judge.name, (first.text, second.text), verdicts)


def evaluate_arena_hard(
    benchmark: ArenaHard, answers: Answerer | Path, folder: Path, *, argv: Sequence[str] = ()
) -> Path:
    """Answer, judge and count; a run that was stopped is continued by the same call.

    Args:
        benchmark: with its judge.
        answers: a model, or a file of its answers in the benchmark's form.
        folder: the run's; gets ``model_answer.jsonl``, ``model_judgment.jsonl`` and ``results.json``.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: something that the user gave cannot be used, or a request finally failed.
    """
    with RunFolder(folder, command="evaluate") as run:
        questions = read_questions(benchmark.questions, benchmark.version)
        theirs = benchmark.read_baselines(questions, run.log)
        ready = read_answers(answers, questions) if isinstance(answers, Path) else None
        identity = {"outputs": file_digest(answers)} if isinstance(answers, Path) else answers.identity()
        run.begin(benchmark.identity() | identity, argv=argv)

        def measure() -> list[Metric]:
            ours = _sampled(benchmark, questions, theirs, answers, run) if isinstance(answers, Answerer) else ready
            assert ours is not None
            model = next(iter(ours.values())).model
            write_answers(folder / ANSWERS, questions, model, [ours[question.uid].text for question in questions])
            show = ShownAnswers(benchmark.judge.strip_thinking)
            ours, baseline = _shown(ours, show), _shown(theirs, show)
            thinking = show.metrics("arena_hard/", run.log)
            judgments = benchmark.play(questions, ours, baseline, run.log)
            write_judgments(folder / JUDGMENTS, judgments)
            found = figures(judgments, ours, baseline, benchmark.version, run.log)
            return found + thinking + benchmark.judge.metrics("arena_hard")

        return run.complete(measure)


def _sampled(
    benchmark: ArenaHard, questions: Sequence[Question], theirs: Answers, answerer: Answerer, run: RunFolder
) -> Answers:
    """The model's answers, once the user has agreed to what judging them may cost."""
    if not (run.path / ANSWERS).exists():
        expected = _answers(questions, answerer.name, [answerer.stand_in()] * len(questions))
        benchmark.judge.agree_beforehand(benchmark.requests(questions, expected, theirs), run.log)
    texts = answerer.answer([question.prompt for question in questions], run.path / "answers")
    return _answers(questions, answerer.name, texts)


def _shown(answers: Answers, show: ShownAnswers) -> Answers:
    """What the judge is shown; a text that has changed has no known number of tokens."""
    shown = {uid: replace(answer, text=show(answer.text)) for uid, answer in answers.items()}
    return {uid: new if new == answers[uid] else replace(new, tokens=None) for uid, new in shown.items()}


def _answers(questions: Sequence[Question], name: str, texts: Sequence[str]) -> Answers:
    return {
        question.uid: Answer(question.uid, name, text, None, question.where)
        for question, text in zip(questions, texts, strict=True)
    }
