"""A judge behind an API: asked after the user has agreed to what it will cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simpo.client import ChatClient, ChatReply, ChatRequest, Prices, agree

Say = Callable[[str], None]


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

    def ask(self, requests: Sequence[ChatRequest], say: Say) -> list[ChatReply]:
        """The replies in the order of the requests, and what they took.

        Raises:
            SimpoError: the user does not agree, or a request finally failed.
        """
        agree(self.client.estimate(requests), yes=self.yes, say=say, prices=self.prices)
        replies = self.client.complete(requests, say=say)
        say(self.client.usage.line(self.prices))
        return replies

    def ask_some(self, requests: Sequence[ChatRequest | None], say: Say) -> list[ChatReply | None]:
        """As :meth:`ask`; where there is nothing to ask the reply is None."""
        replies = iter(self.ask([request for request in requests if request is not None], say))
        return [None if request is None else next(replies) for request in requests]
