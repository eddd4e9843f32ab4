"""Interfaces of judges and scorers, their inputs, and judge prompts."""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple, Self

from simpo.client import Estimate, Usage
from simpo.config.text import read_text_file
from simpo.data.messages import Context, Message
from simpo.data.prompts import PlainPrompt
from simpo.errors import SimpoError, third_party
from simpo.generation.responses import split_thinking
from simpo.runs.results import Metric

Prompt = str | list[Message]
Scores = Sequence[Sequence[float | None]]  # per prompt, one score per response; None for a response without a score


@dataclass(frozen=True)
class Answers:
    """A prompt with one or more responses."""

    id: str  # the prompt's id, for error messages
    prompt: Prompt  # text or messages
    responses: Sequence[str]  # the texts to score
    context: Context = field(default_factory=Context)  # tools and variables for a model scorer's chat template
    extra: Mapping[str, Any] = field(default_factory=dict)  # other columns of the row, such as a reference answer
    where: str = ""  # the row's source for error messages, e.g. `"train.jsonl:12"`; empty if unknown

    def __post_init__(self) -> None:
        """Raise TypeError if ``responses`` is a string, whose characters would otherwise be judged one by one."""
        if isinstance(self.responses, str):
            raise TypeError("responses: expected a sequence of texts, got a single text")

    @classmethod
    def for_prompt(cls, prompt: PlainPrompt, responses: Sequence[str]) -> Self:
        """Combine a prompt from a dataset with ``responses`` to it."""
        return cls(prompt.id, prompt.content, responses, prompt.context, prompt.extra, prompt.where)

    @property
    def location(self) -> str:
        """How error messages refer to the prompt."""
        return f"prompt {self.id} ({self.where})" if self.where else f"prompt {self.id}"

    @property
    def columns(self) -> dict[str, Any]:
        """All columns of the prompt's row except the prompt: ``extra``, tools and chat template variables."""
        return {**self.context.columns, **self.extra}


class Pair(Answers):
    """A prompt with two responses, ``a`` and ``b``; the id identifies the pair if a prompt has several."""

    @property
    def a(self) -> str:
        """The first response."""
        return self.responses[0]

    @property
    def b(self) -> str:
        """The second response."""
        return self.responses[1]


class Judge(ABC):
    """Decides which of two responses is better.

    Attributes:
        first_shown_wins: for judges that see both orders, the fraction of orders in which the response shown first
            won, for every pair in the last call to :meth:`compare`; ties count half, and pairs without a verdict or
            with identical responses are None. Empty for other judges.
    """

    first_shown_wins: Sequence[float | None] = ()

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that determines the verdicts or scores, as JSON values."""

    @property
    def usage(self) -> Usage | None:
        """Running totals of requests to a server; None for a judge that does not use one."""
        return None

    def prepare(self) -> None:  # noqa: B027 - a default
        """Load what the judge needs, so that errors surface before a run folder is created."""

    def check(self, rows: Sequence[Answers]) -> None:  # noqa: B027 - a default
        """Raise :class:`SimpoError` if a row lacks a column that the judge needs, regardless of its responses."""

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """Estimate the requests to a server for judging the responses in ``rows``."""
        return Estimate()

    @abstractmethod
    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Return the probability that ``a`` is better for every pair: 0.5 for a tie, None without a verdict."""

    def margins(self, pairs: Sequence[Pair]) -> list[float] | None:
        """Return the score of ``a`` minus the score of ``b`` for every pair; None for a judge that does not score."""
        return None

    @property
    def conflicting(self) -> int:
        """Number of pairs in which both orders favored the same position."""
        return sum(share in (0.0, 1.0) for share in self.first_shown_wins)


class Scorer(Judge):
    """Scores single responses; the higher the score, the better the response.

    Attributes:
        parts: for a combination of scorers, each one's scores by name, from the last call to :meth:`score`.
    """

    parts: Mapping[str, Scores] = {}

    @property
    def scorers(self) -> Sequence[Scorer]:
        """The scorers that this one combines, or just itself."""
        return [self]

    @abstractmethod
    def score(self, rows: Sequence[Answers]) -> Scores:
        """Score every response; None for a response that cannot be scored."""

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Return 1 if ``a`` scores higher, 0 if ``b`` does, 0.5 for equal scores, None if either has no score."""
        return [verdict_of(margin) for margin in self.margins(pairs) or ()]

    def margins(self, pairs: Sequence[Pair]) -> list[float] | None:
        """Return the score of ``a`` minus the score of ``b`` for every pair; NaN if either has no score.

        A response that occurs in several pairs is scored only once.
        """
        groups: dict[str, list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(_key(pair), []).append(pair)
        rows = []
        for group in groups.values():
            first, texts = group[0], dict.fromkeys(text for pair in group for text in pair.responses)
            rows.append(Answers(first.id, first.prompt, tuple(texts), first.context, first.extra, first.where))
        given = self.score(rows)
        check_scores(given, rows, str(self.identity["judge"]))
        scores = {
            key: {text: math.nan if score is None else score for text, score in zip(row.responses, values, strict=True)}
            for key, row, values in zip(groups, rows, given, strict=True)
        }
        return [scores[_key(pair)][pair.a] - scores[_key(pair)][pair.b] for pair in pairs]


def _key(pair: Pair) -> str:
    """Return a key for the prompt and its context; pairs with the same key are scored together."""
    return json.dumps([pair.prompt, pair.context.columns])


def verdict_of(margin: float) -> float | None:
    """Turn a difference between scores into a verdict; None if it is NaN."""
    if math.isnan(margin):
        return None
    return 0.5 if margin == 0 else float(margin > 0)


def check_scores(scores: Scores, rows: Sequence[Answers], scorer: str) -> None:
    """Raise :class:`SimpoError` unless a scorer returned a finite number or None for every response."""
    if len(scores) != len(rows):
        raise SimpoError(f"{scorer}: {len(scores)} lists of scores for {len(rows)} prompts")
    for row, given in zip(rows, scores, strict=True):
        if len(given) != len(row.responses):
            raise SimpoError(f"{scorer}: prompt {row.id}: {len(given)} scores for {len(row.responses)} responses")
        if not all(score is None or math.isfinite(score) for score in given):
            raise SimpoError(f"{scorer}: prompt {row.id}: expected finite scores, got {given}")


# ---- Judge prompts, and thinking in the answers shown to judges.


def as_text(prompt: Prompt) -> str:
    """Format a prompt as text: the content of a single message, or a conversation with role names."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class PromptFile(NamedTuple):
    """A judge prompt and the SHA-256 of its file, which is part of a run's identity."""

    text: str
    digest: str


def read_prompt_file(path: Path | None, shipped: Traversable, placeholders: Iterable[str]) -> PromptFile:
    """Read a judge prompt, which must contain a placeholder ``{name}`` for each name in ``placeholders``.

    ``path`` is the user's file; None uses ``shipped``, the one in the package.
    """
    with third_party(f"{path}: cannot read the judge prompt"):
        text = shipped.read_bytes().decode("utf-8") if path is None else read_text_file(path)
    for name in placeholders:
        if f"{{{name}}}" not in text:
            raise SimpoError(f"{path}: the judge prompt lacks the placeholder {{{name}}}")
    return PromptFile(text, hashlib.sha256(text.encode()).hexdigest())


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace ``{name}`` placeholders in one pass, so that other braces and placeholders in values stay as they are."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)


class ThinkingFilter:
    """Prepares answers for a judge: counts those with thinking, and optionally strips it."""

    def __init__(self, strip_thinking: bool) -> None:
        self._strip = strip_thinking
        self._answers = self._thinking = self._unclosed = 0

    def __call__(self, answer: str) -> str:
        """Return the answer, without its thinking if that is stripped."""
        thinking, rest = split_thinking(answer)
        self._answers += 1
        self._thinking += bool(thinking)
        self._unclosed += bool(thinking) and not rest
        return rest if self._strip else answer

    def metrics(self, prefix: str, log: Callable[[str], None]) -> list[Metric]:
        """Return counts of answers with thinking, with nothing but thinking, and with thinking stripped, and log them.

        There are none if no answer has thinking. ``prefix`` is prepended to the names of the metrics.
        """
        if not self._thinking:
            return []
        treatment = "it is hidden from judges" if self._strip else "judges see it (--strip_thinking hides it)"
        log(f"note: {self._thinking:,} of {self._answers:,} answers begin with thinking; {treatment}")
        counts = {"with_thinking": self._thinking, "without_end_of_thinking": self._unclosed}
        counts |= {"stripped_of_thinking": self._thinking * self._strip}
        return [Metric(f"{prefix}answers_{key}", count, n=self._answers) for key, count in counts.items()]
