"""A language model behind an API as a judge of pairs and, through a round-robin tournament, a scorer of answers."""

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
    """Asks a server about every pair twice, once in each order.

    The verdict is the mean of the two replies, so a judge that only prefers a position ends in a tie. Identical answers
    are a tie without a request. A pair has no verdict if either reply has none, or if the server refuses a request
    because of its content, such as a text that is too long.

    The score of an answer is its mean probability of winning against the prompt's other answers, from 0 to 1.
    Comparisons without a verdict are ignored; an answer with no verdict at all, such as the only one, has no score.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        prompt: Path | None = None,
        max_tokens: int = 1024,
        log: Callable[[str], None] = print,
    ) -> None:
        """Read the judge prompt and check that there is an API key; nothing is sent.

        ``prompt`` is a file with the placeholders ``{question}``, ``{answer_a}`` and ``{answer_b}``, or None for the
        built-in prompt. A reply cut off at ``max_tokens`` has no verdict.
        """
        client.endpoint.api_key()
        self.client = client
        self._prompt = read_prompt_file(prompt, _SHIPPED, ("question", "answer_a", "answer_b"))
        self._max_tokens = max_tokens
        self._log = log

    @property
    def identity(self) -> dict[str, Any]:
        """The model, the judge prompt's SHA-256, and the maximum reply length."""
        model = self.client.endpoint.model
        return {"judge": "api", "model": model, "prompt": self._prompt.digest, "max_tokens": self._max_tokens}

    @property
    def usage(self) -> Usage:
        """The client's running totals."""
        return self.client.usage

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """Estimate the requests for every pair of answers to each prompt."""
        return self.client.estimate(self.requests([pair for row in rows for pair in _all_pairs(row)]))

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """Return each answer's mean win probability."""
        verdicts = iter(self.compare([pair for row in rows for pair in _all_pairs(row)]))
        scores = []
        for row in rows:
            wins: list[list[float]] = [[] for _ in row.responses]
            for i, j in combinations(range(len(row.responses)), 2):
                if (verdict := next(verdicts)) is not None:
                    wins[i].append(verdict)
                    wins[j].append(1 - verdict)
            scores.append([sum(shares) / len(shares) if shares else None for shares in wins])
        return scores

    def margins(self, pairs: Sequence[Pair]) -> None:
        """Return None: this judge derives scores from verdicts, not verdicts from scores."""

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Return the mean verdict over both orders; raises as :meth:`simpo.client.ChatClient.complete` does."""
        replies = iter(self.client.complete(self.requests(pairs), despite_refusals=True, log=self._log))
        orders = [(0.5, 0.5) if pair.a == pair.b else _both(next(replies), next(replies)) for pair in pairs]
        # Identical responses say nothing about position bias.
        differ = [both if pair.a != pair.b else None for pair, both in zip(pairs, orders, strict=True)]
        self.first_shown_wins = [both and (both[0] + both[1]) / 2 for both in differ]
        return [both and (both[0] + 1 - both[1]) / 2 for both in orders]

    def requests(self, pairs: Sequence[Pair]) -> list[ChatRequest]:
        """Build two requests for each pair of different answers: first with ``a`` shown first, then with ``b``."""
        return [
            ChatRequest([{"role": "user", "content": fill(self._prompt.text, values)}], self._max_tokens)
            for pair in pairs
            if pair.a != pair.b
            for first, second in ((pair.a, pair.b), (pair.b, pair.a))
            for values in [{"question": as_text(pair.prompt), "answer_a": first, "answer_b": second}]
        ]


def _both(*replies: ChatReply) -> tuple[float, float] | None:
    """Return both orders' verdicts on the response shown first, or None unless both replies have one."""
    first, second = map(read_verdict, replies)
    return None if first is None or second is None else (first, second)


def read_verdict(reply: ChatReply) -> float | None:
    """Return 1 if the first answer wins, 0 if the second does, 0.5 for a tie, or None without a complete verdict.

    The last verdict after any thinking counts, because the reasoning before it may mention others.
    """
    verdicts = _VERDICT.findall(after_thinking(reply.complete_text) or "")
    return _FIRST_WINS[verdicts[-1]] if verdicts else None


def _all_pairs(row: Answers) -> list[Pair]:
    return [
        Pair(f"{row.id}/{i}-{j}", row.prompt, (row.responses[i], row.responses[j]), row.context)
        for i, j in combinations(range(len(row.responses)), 2)
    ]
