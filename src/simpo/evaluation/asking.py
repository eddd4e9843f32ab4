"""A judge behind an API: asked after the user has agreed to what it will cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simpo.client import ChatClient, ChatReply, ChatRequest, Prices, agree
from simpo.client.chat_client import TRIED
from simpo.results import Metric

Say = Callable[[str], None]
Check = Callable[[Sequence[ChatReply]], None]


@dataclass
class ApiJudge:
    """A model that judges.

    Attributes:
        client: sends what it is asked.
        prices: of its tokens, where they are known.
        yes: whether the user has agreed.
        strip_thinking: show it the answers without the thinking that they begin with.
        max_tokens: longest reply; None for the benchmark's own limit.
    """

    client: ChatClient
    prices: Prices | None = None
    yes: bool = False
    strip_thinking: bool = False
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        """The model's name on its server."""
        return self.client.endpoint.model

    @property
    def identity(self) -> dict[str, Any]:
        """What of it determines the verdicts; what is off is left out, so that earlier runs can be continued."""
        given = {"strip_thinking": self.strip_thinking, "judge_max_tokens": self.max_tokens}
        return {"judge": self.name} | {key: value for key, value in given.items() if value}

    def metrics(self, benchmark: str) -> list[Metric]:
        """How many replies it gave at another temperature than the benchmark's, where it did."""
        usage = self.client.usage
        found = Metric(f"{benchmark}/judged_at_default_temperature", usage.default_temperature, n=usage.replies)
        return [found] if usage.default_temperature else []

    def agree_beforehand(self, requests: Sequence[ChatRequest | None], say: Say) -> None:
        """Let the user agree before answers are sampled, which may take long; :meth:`ask` then does not ask again.

        Args:
            requests: with answers as long as they may be; None where there will be nothing to ask.
            say: gets the line.

        Raises:
            SimpoError: the user does not agree, or cannot be asked.
        """
        wanted = self._limited([request for request in requests if request is not None])
        agree(
            self.client.estimate(wanted),
            yes=self.yes,
            say=lambda line: say(f"the judge, with answers as long as they may be: {line}"),
            prices=self.prices,
        )
        self.yes = True

    def ask(self, requests: Sequence[ChatRequest], say: Say, check_first: Check | None = None) -> list[ChatReply]:
        """The replies in the order of the requests, and what they took.

        Args:
            requests: what is asked.
            say: gets lines of progress.
            check_first: gets the first few replies before more is sent, and raises if they will not do.

        Raises:
            SimpoError: the user does not agree, a request finally failed, the first ones were all refused, or as
                ``check_first``.
        """
        requests = self._limited(requests)
        agree(self.client.estimate(requests), yes=self.yes, say=say, prices=self.prices)
        few = 0 if check_first is None else max(TRIED, self.client.endpoint.concurrency)
        replies = self.client.complete(requests[:few], despite_refusals=True)
        if check_first is not None and replies:
            check_first(replies)
        replies += self.client.complete(requests[few:], despite_refusals=True, say=say)
        say(self.client.usage.line(self.prices))
        return replies

    def _limited(self, requests: Sequence[ChatRequest]) -> list[ChatRequest]:
        """The requests with the longest reply that the user allows."""
        if self.max_tokens is None:
            return list(requests)
        return [replace(request, max_tokens=self.max_tokens) for request in requests]

    def ask_some(
        self, requests: Sequence[ChatRequest | None], say: Say, check_first: Check | None = None
    ) -> list[ChatReply | None]:
        """As :meth:`ask`; where there is nothing to ask the reply is None."""
        replies = iter(self.ask([request for request in requests if request is not None], say, check_first))
        return [None if request is None else next(replies) for request in requests]
