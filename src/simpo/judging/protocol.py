"""The inputs of judges and scorers, the interfaces that they implement, and what judges are shown."""

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
from simpo.data.messages import Context, Message
from simpo.data.prompts import PlainPrompt
from simpo.errors import SimpoError, third_party
from simpo.generation.responses import split_thinking
from simpo.runs.results import Metric

Prompt = str | list[Message]
Scores = Sequence[Sequence[float | None]]  # one list per prompt with one score per response; None where there is none


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

    def __post_init__(self) -> None:
        """Raise TypeError for one text as ``responses``, whose characters would be judged."""
        if isinstance(self.responses, str):
            raise TypeError("responses: expected a sequence of texts, got one text")

    @classmethod
    def to(cls, prompt: PlainPrompt, responses: Sequence[str]) -> Self:
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


class Pair(Answers):
    """A prompt with two responses, ``a`` and ``b``; its id may be that of one of the prompt's pairs."""

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
        first_shown: if the judge is shown both orders of a pair: for every pair of the last call of :meth:`compare`,
            the share of the two orders in which the response shown first wins, ties counting half; None for a pair
            without a verdict or of identical responses. Empty for other judges.
    """

    first_shown: Sequence[float | None] = ()

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that determines the verdicts, and the scores of a scorer, as JSON values."""

    @property
    def usage(self) -> Usage | None:
        """The requests sent to a server so far; None for a judge that does not use one."""
        return None

    def prepare(self) -> None:  # noqa: B027 - a default
        """Load what judging needs, so that a mistake shows before a run folder is created."""

    def check(self, rows: Sequence[Answers]) -> None:  # noqa: B027 - a default
        """Raise :class:`SimpoError` if a prompt's row lacks a column that judging needs, whatever the responses."""

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """The requests to a server that judging the responses in each of ``rows`` takes."""
        return Estimate()

    @abstractmethod
    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The probability that ``a`` is better for every pair, 0.5 for a tie; None where there is no verdict."""

    def margins(self, pairs: Sequence[Pair]) -> list[float] | None:
        """By how much the score of ``a`` exceeds the score of ``b``; None for a judge without scores of its own."""
        return None

    @property
    def conflicting(self) -> int:
        """Number of pairs whose verdict favored the same position in both orders."""
        return sum(share in (0.0, 1.0) for share in self.first_shown)


class Scorer(Judge):
    """Scores single responses; the higher the score, the better the response.

    Attributes:
        parts: if it combines several scorers, the scores of each by its name, of the last call of :meth:`score`.
    """

    parts: Mapping[str, Scores] = {}

    @property
    def scorers(self) -> Sequence[Scorer]:
        """The scorers that it combines, or itself."""
        return [self]

    @abstractmethod
    def score(self, rows: Sequence[Answers]) -> Scores:
        """The scores; None where none could be determined."""

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """1, 0, or 0.5 for equal scores; None where a response has no score."""
        return [verdict_of(margin) for margin in self.margins(pairs) or ()]

    def margins(self, pairs: Sequence[Pair]) -> list[float] | None:
        """By how much the score of ``a`` exceeds the score of ``b``; NaN where one of them has no score.

        A response in several pairs is scored once.
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
    """Identifies a prompt with its context: the answers to it are scored together."""
    return json.dumps([pair.prompt, pair.context.columns])


def verdict_of(margin: float) -> float | None:
    """The verdict for a difference of scores; None where it is NaN."""
    if math.isnan(margin):
        return None
    return 0.5 if margin == 0 else float(margin > 0)


def check_scores(scores: Scores, rows: Sequence[Answers], scorer: str) -> None:
    """Raise :class:`SimpoError` unless a scorer returned one finite number, or None, for every response."""
    if len(scores) != len(rows):
        raise SimpoError(f"{scorer}: {len(scores)} lists of scores for {len(rows)} prompts")
    for row, given in zip(rows, scores, strict=True):
        if len(given) != len(row.responses):
            raise SimpoError(f"{scorer}: prompt {row.id}: {len(given)} scores for {len(row.responses)} responses")
        if not all(score is None or math.isfinite(score) for score in given):
            raise SimpoError(f"{scorer}: prompt {row.id}: {given} are not all numbers")


# ---- Judge prompts, and what judges are shown of an answer.


def as_text(prompt: Prompt) -> str:
    """A prompt as one text: a single message is its content; a longer conversation names the roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class PromptFile(NamedTuple):
    """The text of a judge prompt, and the SHA-256 of its file, which is part of a result's identity."""

    text: str
    digest: str


def read_prompt_file(path: Path | None, shipped: Traversable, places: Iterable[str]) -> PromptFile:
    """Read a judge prompt that contains a placeholder ``{name}`` for every one of ``places``.

    ``path`` is the user's file; None for ``shipped``, the one in the package.
    """
    with third_party(f"{path}: the judge prompt cannot be read"):
        content = shipped.read_bytes() if path is None else path.read_bytes()
        text = content.decode("utf-8")
    for name in places:
        if f"{{{name}}}" not in text:
            raise SimpoError(f"{path}: the judge prompt lacks the placeholder {{{name}}}")
    return PromptFile(text, hashlib.sha256(content).hexdigest())


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace ``{name}`` placeholders in one pass: other braces stay, and values are not searched for placeholders."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


class ShownAnswers:
    """Maps an answer to the text that judges are shown, and counts the answers that contain thinking."""

    def __init__(self, strip_thinking: bool) -> None:
        self._strip = strip_thinking
        self._answers = self._thinking = self._endless = 0

    def __call__(self, answer: str) -> str:
        """The answer, or the part after its thinking."""
        thinking, rest = split_thinking(answer)
        self._answers += 1
        self._thinking += bool(thinking)
        self._endless += bool(thinking) and not rest
        return rest if self._strip else answer

    def metrics(self, prefix: str, log: Callable[[str], None]) -> list[Metric]:
        """Counts of answers with thinking, of those with nothing else, and of those from which it was removed.

        Empty if no answer had any; otherwise one line is logged. ``prefix`` starts the names of the metrics.
        """
        if not self._thinking:
            return []
        treatment = "judges are not shown it" if self._strip else "judges are shown it: --strip_thinking removes it"
        log(f"note: {self._thinking:,} of {self._answers:,} answers begin with thinking; {treatment}")
        counts = {"with_thinking": self._thinking, "without_end_of_thinking": self._endless}
        counts |= {"stripped_of_thinking": self._thinking * self._strip}
        return [Metric(f"{prefix}answers_{key}", count, n=self._answers) for key, count in counts.items()]
