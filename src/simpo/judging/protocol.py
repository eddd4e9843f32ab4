"""The inputs of judges and scorers, and the two interfaces that they implement."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simpo.client import Estimate, Usage
from simpo.data.messages import Context, Message
from simpo.data.prompts import PlainPrompt
from simpo.errors import SimpoError

Prompt = str | list[Message]


@dataclass(frozen=True)
class Answers:
    """A prompt with one or more responses."""

    id: str  # the prompt's id, for error messages
    prompt: Prompt  # text or messages
    responses: Sequence[str]  # the texts to score
    # Tools and variables for the chat template of a scorer that is a model.
    context: Context = field(default_factory=Context)
    # The columns of the prompt's row that are not used otherwise, such as a reference answer.
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""  # where the row comes from, e.g. `"train.jsonl:12"`, for error messages; empty if that is not known

    @classmethod
    def to(cls, prompt: PlainPrompt, responses: Sequence[str]) -> Answers:
        """The ``responses`` to a prompt of a data set."""
        return cls(prompt.id, prompt.content, responses, prompt.context, prompt.extra, prompt.where)

    @property
    def place(self) -> str:
        """The prompt as error messages name it."""
        return f"prompt {self.id} ({self.where})" if self.where else f"prompt {self.id}"

    @property
    def columns(self) -> dict[str, Any]:
        """The prompt's row without the prompt itself: ``extra``, and the columns with tools and template variables."""
        return {**self.context.columns, **self.extra}


@dataclass(frozen=True)
class Pair:
    """A prompt with two responses, ``a`` and ``b``."""

    id: str  # the prompt's id, unless the prompt has several pairs
    prompt: Prompt  # text or messages
    a: str  # the first response
    b: str  # the second response
    context: Context = field(default_factory=Context)  # as in Answers
    extra: Mapping[str, Any] = field(default_factory=dict)  # as in Answers

    @classmethod
    def to(cls, prompt: PlainPrompt, a: str, b: str) -> Pair:
        """Two responses to a prompt of a data set."""
        return cls(prompt.id, prompt.content, a, b, prompt.context, prompt.extra)


class _Priced(ABC):
    """The common base of scorers and judges."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that determines the scores or verdicts, as JSON values."""

    @property
    def usage(self) -> Usage | None:
        """The requests sent to a server so far; None for a scorer or judge that does not use one."""
        return None


class Scorer(_Priced):
    """Scores single responses; the higher the score, the better the response."""

    @abstractmethod
    def score(self, rows: Sequence[Answers]) -> Sequence[Sequence[float | None]]:
        """One list per prompt with one score per response; None where no score could be determined."""

    def prepare(self) -> None:
        """Load what scoring needs, so that a mistake shows before a run folder is created."""

    def check(self, rows: Sequence[Answers]) -> None:
        """Raise :class:`SimpoError` if a prompt's row lacks a column that scoring needs, whatever the responses."""

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """The requests that :meth:`score` would send to a server."""
        return Estimate()


class Judge(_Priced):
    """Decides which of two responses is better.

    Attributes:
        first_shown: if the judge is shown both orders of a pair: for every pair of the last call of :meth:`compare`,
            the share of the two orders in which the response shown first wins, ties counting half; None for a pair
            without a verdict or of identical responses. Empty for other judges.
    """

    first_shown: Sequence[float | None] = ()

    @property
    def conflicting(self) -> int:
        """Number of pairs whose verdict favored the same position in both orders."""
        return sum(share in (0.0, 1.0) for share in self.first_shown)

    @abstractmethod
    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The probability that ``a`` is better for every pair, 0.5 for a tie; None where there is no verdict."""

    def check(self, pairs: Sequence[Pair]) -> None:
        """As :meth:`Scorer.check`."""

    def margins(self, pairs: Sequence[Pair]) -> list[float] | None:
        """By how much the score of ``a`` exceeds the score of ``b``; None for a judge without scores."""
        return None

    def estimate(self, pairs: Sequence[Pair]) -> Estimate:
        """The requests that :meth:`compare` would send to a server."""
        return Estimate()


def check_scores(scores: Sequence[Sequence[float | None]], rows: Sequence[Answers], scorer: str) -> None:
    """Raise :class:`SimpoError` unless a scorer returned one finite number, or None, for every response."""
    if len(scores) != len(rows):
        raise SimpoError(f"{scorer}: {len(scores)} lists of scores for {len(rows)} prompts")
    for row, given in zip(rows, scores, strict=True):
        if len(given) != len(row.responses):
            raise SimpoError(f"{scorer}: prompt {row.id}: {len(given)} scores for {len(row.responses)} responses")
        if not all(score is None or math.isfinite(score) for score in given):
            raise SimpoError(f"{scorer}: prompt {row.id}: {given} are not all numbers")
