"""What is judged, and what a judge and a scorer can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from simpo.data.context import Context
from simpo.data.messages import Message
from simpo.errors import SimpoError

Prompt = str | list[Message]


def as_text(prompt: Prompt) -> str:
    """A prompt to be read: a lone message is its text, a conversation names who speaks."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclass(frozen=True)
class Answers:
    """A prompt and answers to it.

    Attributes:
        id: of the prompt, for messages.
        prompt: text or messages.
        responses: one or more texts.
        context: tools and variables for the chat template of a scorer that is a model.
    """

    id: str
    prompt: Prompt
    responses: Sequence[str]
    context: Context = field(default_factory=Context)


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it.

    Attributes:
        id: of the pair: the prompt's, unless the prompt has several pairs.
        prompt: text or messages.
        a: the one answer.
        b: the other.
        context: as of :class:`Answers`.
    """

    id: str
    prompt: Prompt
    a: str
    b: str
    context: Context = field(default_factory=Context)


class Scorer(Protocol):
    """Says of single answers how good they are."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the scores, as JSON values."""
        ...

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """One list for every prompt, with a number for every response; the higher, the better.

        Raises:
            SimpoError: a row cannot be scored; names it.
        """
        ...


class Annotator(Protocol):
    """A scorer that may leave answers without a score; every :class:`Scorer` is one."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the scores, as JSON values."""
        ...

    def score(self, rows: Sequence[Answers]) -> Sequence[Sequence[float | None]]:
        """As :meth:`Scorer.score`; None for an answer of which nothing could be said."""
        ...


class Judge(Protocol):
    """Says of two answers which one is better."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the verdicts, as JSON values."""
        ...

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """For every pair the probability that ``a`` is better, a tie being half; None where there is no verdict.

        Raises:
            SimpoError: the pairs cannot be judged.
        """
        ...


def check_scores(scores: Sequence[Sequence[float]], rows: Sequence[Answers], scorer: str) -> None:
    """Look at what a scorer gave.

    Raises:
        SimpoError: not one finite number for every response; names the scorer and the prompt.
    """
    if len(scores) != len(rows):
        raise SimpoError(f"{scorer}: {len(scores)} lists of scores for {len(rows)} prompts")
    for row, given in zip(rows, scores, strict=True):
        if len(given) != len(row.responses):
            raise SimpoError(f"{scorer}: prompt {row.id}: {len(given)} scores for {len(row.responses)} responses")
        if not all(map(math.isfinite, given)):
            raise SimpoError(f"{scorer}: prompt {row.id}: {given} are not all numbers")
