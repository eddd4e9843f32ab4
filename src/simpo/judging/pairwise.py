"""A language model behind a server as a judge of pairs, or in a tournament as a scorer of single answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from simpo.client import ChatClient, ChatReply, ChatRequest, Estimate, Usage
from simpo.errors import SimpoError
from simpo.generation.thinking import after_thinking
from simpo.judging.protocol import Answers, Pair, Prompt, as_text

# ---- Judge prompts in files: which one is used is part of a result.


class PromptFile(NamedTuple):
    """A prompt's text, and the SHA-256 of its file."""

    text: str
    digest: str


def read_prompt_file(path: Path | None, shipped: Traversable, places: Iterable[str]) -> PromptFile:
    """Read a prompt that has a place ``{name}`` for every value.

    Args:
        path: the user's file; None for the one that comes with the package.
        shipped: that one.
        places: names of the values.

    Raises:
        SimpoError: the file cannot be read, or lacks a place.
    """
    try:
        content = shipped.read_bytes() if path is None else path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SimpoError(f"{path}: the judge prompt cannot be read: {error}") from error
    for name in places:
        if f"{{{name}}}" not in text:
            raise SimpoError(f"{path}: the judge prompt has no place {{{name}}}")
    return PromptFile(text, hashlib.sha256(content).hexdigest())


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put values into ``{name}`` places; whatever else is in braces stays, and values are not looked into."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda place: values[place[1]], template)


_SHIPPED = resources.files("simpo.judging") / "prompts" / "pairwise.md"


_PLACES = ("question", "answer_a", "answer_b")


_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")


_FIRST_WINS = {"A": 1.0, "B": 0.0, "C": 0.5}


class PairwiseApiJudge:
    """Asks about every pair twice, each answer standing first once.

    The verdict is the mean of the two, so that a judge that likes whatever stands first gives a tie. Identical answers
    are a tie and nothing is asked. A pair without a verdict in both orders has none; a request that the server refuses
    because of what it holds, such as a text that is too long, gives none.

    Attributes:
        client: whom it asks.
        conflicting: pairs of which each order gave another winner, so far.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        prompt: Path | None = None,
        max_tokens: int = 1024,
        log: Callable[[str], None] = print,
    ) -> None:
        """Nothing is asked yet.

        Args:
            client: whom to ask.
            prompt: file of a judge prompt with places ``{question}``, ``{answer_a}`` and ``{answer_b}``; None for the
                one that comes with the package.
            max_tokens: longest reply; one that is cut off has no verdict.
            log: called with lines of progress.

        Raises:
            SimpoError: the prompt cannot be read, or there is no key.
        """
        client.endpoint.api_key()
        self.client = client
        self.conflicting = 0
        self._prompt = read_prompt_file(prompt, _SHIPPED, _PLACES)
        self._max_tokens = max_tokens
        self._log = log

    @property
    def identity(self) -> dict[str, Any]:
        """Model, SHA-256 of the judge prompt's file, and length of replies."""
        model = self.client.endpoint.model
        return {"judge": "api", "model": model, "prompt": self._prompt.digest, "max_tokens": self._max_tokens}

    def estimate(self, pairs: Sequence[Pair]) -> Estimate:
        """What :meth:`compare` would send."""
        return self.client.estimate(self._requests(pairs))

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The mean verdict over both orders.

        Raises:
            SimpoError: as :meth:`simpo.client.ChatClient.complete`.
        """
        replies = iter(self.client.complete(self._requests(pairs), despite_refusals=True, log=self._log))
        return [0.5 if pair.a == pair.b else self._verdict(next(replies), next(replies)) for pair in pairs]

    def _verdict(self, a_first: ChatReply, b_first: ChatReply) -> float | None:
        """The mean over both orders."""
        first, second = read_verdict(a_first), read_verdict(b_first)
        if first is None or second is None:
            return None
        self.conflicting += first == second != 0.5  # the same place won twice
        return (first + 1 - second) / 2

    def _requests(self, pairs: Sequence[Pair]) -> list[ChatRequest]:
        """Two for each pair of different answers: ``a`` first, then ``b`` first."""
        return [
            self._request(pair.prompt, *shown)
            for pair in pairs
            if pair.a != pair.b
            for shown in ((pair.a, pair.b), (pair.b, pair.a))
        ]

    def _request(self, prompt: Prompt, first: str, second: str) -> ChatRequest:
        values = {"question": as_text(prompt), "answer_a": first, "answer_b": second}
        return ChatRequest([{"role": "user", "content": fill(self._prompt.text, values)}], self._max_tokens)


def read_verdict(reply: ChatReply) -> float | None:
    """1 if the first answer wins, 0 if the second, half for a tie; None if the reply has no verdict or was cut off.

    The last verdict after the reply's thinking counts, because reasons may name others before it.
    """
    found = _VERDICT.findall(after_thinking(reply.whole_text) or "")
    return _FIRST_WINS[found[-1]] if found else None


# ---- A judge of pairs as a scorer: every answer to a prompt meets every other.


class TournamentScorer:
    """Scores an answer with its mean probability of winning against the prompt's other answers, from 0 to 1.

    A meeting without a verdict does not count; an answer without any verdict has no score. A lone answer has none.
    """

    def __init__(self, judge: PairwiseApiJudge) -> None:
        self._judge = judge

    @property
    def identity(self) -> dict[str, Any]:
        """The judge's."""
        return {**self._judge.identity, "judge": "api"}

    @property
    def usage(self) -> Usage:
        """What the judge has sent so far."""
        return self._judge.client.usage

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """What :meth:`score` would send."""
        return self._judge.estimate([pair for row in rows for pair in _meetings(row)])

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """Mean win probabilities.

        Raises:
            SimpoError: as the judge.
        """
        verdicts = iter(self._judge.compare([pair for row in rows for pair in _meetings(row)]))
        return [_means(len(row.responses), [next(verdicts) for _ in _meetings(row)]) for row in rows]


def _meetings(row: Answers) -> list[Pair]:
    return [
        Pair(f"{row.id}/{i}-{j}", row.prompt, row.responses[i], row.responses[j], row.context)
        for i, j in combinations(range(len(row.responses)), 2)
    ]


def _means(count: int, verdicts: Sequence[float | None]) -> list[float | None]:
    """The score of every answer: its share of wins in the comparisons with all others."""
    won: list[list[float]] = [[] for _ in range(count)]
    for (i, j), verdict in zip(combinations(range(count), 2), verdicts, strict=True):
        if verdict is not None:
            won[i].append(verdict)
            won[j].append(1 - verdict)
    return [sum(shares) / len(shares) if shares else None for shares in won]
