"""A language model behind a server as a judge of pairs and, by a tournament, as a scorer of single answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

from simpo.client import ChatClient, ChatReply, ChatRequest, Estimate, Usage
from simpo.generation.responses import after_thinking
from simpo.judging.protocol import Answers, Pair, Scorer, as_text, fill, read_prompt_file

_SHIPPED = resources.files("simpo.judging") / "prompts" / "pairwise.md"
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_FIRST_WINS = {"A": 1.0, "B": 0.0, "C": 0.5}


class PairwiseApiJudge(Scorer):
    """Asks a server about every pair twice, once in each order of the two answers.

    The verdict is the mean of both replies, so a judge that prefers a position ends in a tie. Identical answers are a
    tie without a request. A pair has no verdict if either reply has none; neither does a pair with a request that the
    server refuses because of its content, such as a text that is too long.

    The score of an answer is its mean probability of winning against the prompt's other answers, from 0 to 1. A
    comparison without a verdict does not count; an answer without any verdict, such as a single one, has no score.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        prompt: Path | None = None,
        max_tokens: int = 1024,
        log: Callable[[str], None] = print,
    ) -> None:
        """Read the judge prompt and check that there is a key; nothing is sent.

        ``prompt`` is a file with the placeholders ``{question}``, ``{answer_a}`` and ``{answer_b}``; None for the one
        in the package. A reply that ``max_tokens`` cuts off has no verdict.
        """
        client.endpoint.api_key()
        self.client = client
        self._prompt = read_prompt_file(prompt, _SHIPPED, ("question", "answer_a", "answer_b"))
        self._max_tokens = max_tokens
        self._log = log

    @property
    def identity(self) -> dict[str, Any]:
        """Model, SHA-256 of the judge prompt's file, and length of replies."""
        model = self.client.endpoint.model
        return {"judge": "api", "model": model, "prompt": self._prompt.digest, "max_tokens": self._max_tokens}

    @property
    def usage(self) -> Usage:
        """The client's usage."""
        return self.client.usage

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """The requests for every two answers to a prompt."""
        return self.client.estimate(self.requests([pair for row in rows for pair in _all_pairs(row)]))

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """Mean win probabilities."""
        verdicts = iter(self.compare([pair for row in rows for pair in _all_pairs(row)]))
        scores = []
        for row in rows:
            won: list[list[float]] = [[] for _ in row.responses]
            for i, j in combinations(range(len(row.responses)), 2):
                if (verdict := next(verdicts)) is not None:
                    won[i].append(verdict)
                    won[j].append(1 - verdict)
            scores.append([sum(shares) / len(shares) if shares else None for shares in won])
        return scores

    def margins(self, pairs: Sequence[Pair]) -> None:
        """None: scores are made from verdicts here, not verdicts from scores."""

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The mean verdict over both orders; fails like :meth:`simpo.client.ChatClient.complete`."""
        replies = iter(self.client.complete(self.requests(pairs), despite_refusals=True, log=self._log))
        orders = [(0.5, 0.5) if pair.a == pair.b else _both(next(replies), next(replies)) for pair in pairs]
        # Identical responses show nothing about position bias.
        differ = [found if pair.a != pair.b else None for pair, found in zip(pairs, orders, strict=True)]
        self.first_shown = [found and (found[0] + found[1]) / 2 for found in differ]
        return [found and (found[0] + 1 - found[1]) / 2 for found in orders]

    def requests(self, pairs: Sequence[Pair]) -> list[ChatRequest]:
        """Two requests for each pair of different answers: first with ``a`` in the first place, then with ``b``."""
        return [
            ChatRequest([{"role": "user", "content": fill(self._prompt.text, values)}], self._max_tokens)
            for pair in pairs
            if pair.a != pair.b
            for first, second in ((pair.a, pair.b), (pair.b, pair.a))
            for values in [{"question": as_text(pair.prompt), "answer_a": first, "answer_b": second}]
        ]


def _both(*replies: ChatReply) -> tuple[float, float] | None:
    """The verdicts of both orders, each on the response shown first; None unless both replies have one."""
    first, second = map(read_verdict, replies)
    return None if first is None or second is None else (first, second)


def read_verdict(reply: ChatReply) -> float | None:
    """1 if the first answer wins, 0 if the second, 0.5 for a tie; None if there is no verdict or it was cut off.

    The last verdict after the reply's thinking counts, because the reasons before it may mention others.
    """
    found = _VERDICT.findall(after_thinking(reply.complete_text) or "")
    return _FIRST_WINS[found[-1]] if found else None


def _all_pairs(row: Answers) -> list[Pair]:
    return [
        Pair(f"{row.id}/{i}-{j}", row.prompt, (row.responses[i], row.responses[j]), row.context)
        for i, j in combinations(range(len(row.responses)), 2)
    ]
