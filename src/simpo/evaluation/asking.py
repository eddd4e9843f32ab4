"""A judge behind an API: asked after the user has agreed to what it will cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simpo.client import ChatClient, ChatReply, ChatRequest, Prices, agree

Say = Callable[[str], None]
Check = Callable[[Sequence[ChatReply]], None]


@dataclass
class ApiJudge:
    """A model that judges.

    Attributes:
        client: sends what it is asked.
        prices: of its tokens, where they are known.
        yes: whether the user has agreed beforehand.
    """

    client: ChatClient
    prices: Prices | None = None
    yes: bool = False

    @property
    def name(self) -> str:
        """The model's name on its server."""
        return self.client.endpoint.model

    def ask(self, requests: Sequence[ChatRequest], say: Say, check_first: Check | None = None) -> list[ChatReply]:
        """The replies in the order of the requests, and what they took.

        Args:
            requests: what is asked.
            say: gets lines of progress.
            check_first: gets the first few replies before more is sent, and raises if they will not do.

        Raises:
            SimpoError: the user does not agree, a request finally failed, or as ``check_first``.
        """
        agree(self.client.estimate(requests), yes=self.yes, say=say, prices=self.prices)
        few = 0 if check_first is None else self.client.endpoint.concurrency
        replies = self.client.complete(requests[:few])
        if check_first is not None and replies:
            check_first(replies)
        replies += self.client.complete(requests[few:], say=say)
        say(self.client.usage.line(self.prices))
        return replies

    def ask_some(
        self, requests: Sequence[ChatRequest | None], say: Say, check_first: Check | None = None
    ) -> list[ChatReply | None]:
        """As :meth:`ask`; where there is nothing to ask the reply is None."""
        replies = iter(self.ask([request for request in requests if request is not None], say, check_first))
        return [None if request is None else next(replies) for request in requests]
