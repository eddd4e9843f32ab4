"""``simpo evaluate gsm8k``: answers, and the number that each one gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from simpo.data.rows import rows_of
from simpo.data.sources import has_one_split, load_rows
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answerer
from simpo.evaluation.rows import text_in
from simpo.generation.thinking import after_thinking
from simpo.runs.folder import RunFolder
from simpo.runs.results import Metric, Stage, fingerprint
from simpo.statistics import mean_interval, proportion_interval

# ---- The number that a text ends in.


_NUMBER = re.compile(r"(?<![\d.])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The number after the last ``####`` or, where nothing is marked so, the last number; None without any.

    Thousands' commas and dollar signs do not count, and neither do numbers in the model's thinking.
    """
    text = after_thinking(text) or ""
    marked = _NUMBER.findall(text.rpartition(_MARK)[2]) if _MARK in text else []
    found = marked[:1] or _NUMBER.findall(text)[-1:]
    return Decimal(found[0].replace(",", "").replace("$", "")) if found else None


def reference_number(answer: str, where: str) -> Decimal:
    """The number that a row's reference answer ends in.

    Raises:
        SimpoError: it has none.
    """
    found = final_number(answer) if _MARK in answer else None
    if found is None:
        raise SimpoError(f"{where}: answer: no number after {_MARK}")
    return found


_ASKED = "{}\n\nThink step by step. End with a line that has nothing but #### and the number, like this: #### 42"


Problem = tuple[str, Decimal]


def read_problems(data: str, split: str, limit: int | None) -> list[Problem]:
    """Questions and the numbers that answer them.

    Args:
        data: file of ``{question, answer}`` rows, or the hub's ``openai/gsm8k``.
        split: of a hub data set.
        limit: how many of the first rows to take; all if None.

    Raises:
        SimpoError: they cannot be read, an answer has no number after ``####``, or the limit leaves none.
    """
    if limit is not None and limit < 1:
        raise SimpoError(f"limit: must be at least 1, not {limit}")
    dataset = load_rows(data, split=split, config=None if has_one_split(data) else "main", any_split=True)
    dataset = dataset.select(range(min(limit or len(dataset), len(dataset))))
    rows = rows_of(dataset[:], range(len(dataset)), data)
    return [
        (text_in(row, "question", where), reference_number(text_in(row, "answer", where), where)) for row, where in rows
    ]


def evaluate_gsm8k(
    problems: Sequence[Problem],
    model: Answerer,
    against: Answerer | None,
    folder: Path,
    *,
    argv: Sequence[str] = (),
) -> Path:
    """Answer and count what is right; a run that was stopped is continued by the same call.

    Args:
        problems: of :func:`read_problems`.
        model: who answers.
        against: the model that it was made from, which answers too.
        folder: the run's.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: as ``simpo sample``.
    """
    with RunFolder(folder, command="evaluate") as run:
        identity = {"benchmark": "gsm8k", "problems": fingerprint([[text, str(number)] for text, number in problems])}
        identity |= model.identity()
        if against is not None:
            identity |= {f"against/{key}": value for key, value in against.identity().items()}
        run.begin(identity, argv=argv)
        return run.complete(lambda: _measure(problems, model, against, folder))


def _measure(problems: Sequence[Problem], model: Answerer, against: Answerer | None, folder: Path) -> list[Metric]:
    after = _numbers(model, problems, folder / "answers")
    if against is None:
        return _figures(problems, after, None)
    before = _numbers(against, problems, folder / "answers-against")
    figures = _figures(problems, before, "before") + _figures(problems, after, "after")
    return [*figures, _difference(problems, before, after)]


def _numbers(model: Answerer, problems: Sequence[Problem], folder: Path) -> list[Decimal | None]:
    return [final_number(text) for text in model.answer([_ASKED.format(question) for question, _ in problems], folder)]


def _right(problems: Sequence[Problem], numbers: Sequence[Decimal | None]) -> np.ndarray:
    return np.array([found == number for (_, number), found in zip(problems, numbers, strict=True)])


def _figures(problems: Sequence[Problem], numbers: Sequence[Decimal | None], stage: Stage | None) -> list[Metric]:
    right = _right(problems, numbers)
    found = proportion_interval(int(right.sum()), len(right))
    return [
        Metric.of("gsm8k/accuracy", found, stage),
        Metric("gsm8k/without_number", sum(number is None for number in numbers), stage, len(numbers)),
    ]


def _difference(
    problems: Sequence[Problem], before: Sequence[Decimal | None], after: Sequence[Decimal | None]
) -> Metric:
    """The change of accuracy, after minus before, paired by problem."""
    difference = _right(problems, after).astype(float) - _right(problems, before)
    found = mean_interval(difference)
    return Metric.of("gsm8k/difference", found, method=f"paired, {found.method}")
