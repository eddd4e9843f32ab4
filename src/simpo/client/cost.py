"""The cost of requests: estimated before they are sent, counted afterwards."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Self

from simpo.client.chat import ChatReply, ChatRequest
from simpo.errors import SimpoError

_CHARACTERS = 4  # per token of English text, approximately


def placeholder_answer(tokens: int, name: str = "") -> str:
    """A text that counts as this many tokens, for an answer that does not exist yet; different names differ."""
    return name.ljust(_CHARACTERS * tokens, ".")


@dataclass(frozen=True)
class Prices:
    """A model's prices in dollars per million tokens: of the ``prompt`` and of the ``completion``."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for price in (self.prompt, self.completion):
            if not 0 <= price < math.inf:
                raise SimpoError(f"prices: {price:g} dollars per million tokens is not a price")

    def dollars(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of these numbers of tokens, in dollars."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass(frozen=True)
class Estimate:
    """The size of the requests that are about to be sent."""

    requests: int = 0  # number of requests that will be sent
    cached: int = 0  # number of requests whose replies are in the cache
    prompt_tokens: int = 0  # approximate tokens of the requests, at four characters each
    completion_tokens: int = 0  # the largest possible number of tokens of the replies

    @classmethod
    def of(cls, missing: Iterable[ChatRequest], cached: int) -> Self:
        """Estimate for requests that are not cached."""
        sent = list(missing)
        characters = sum(len(message["content"]) for request in sent for message in request.messages)
        longest = sum(request.max_tokens for request in sent)
        return cls(len(sent), cached, math.ceil(characters / _CHARACTERS), longest)

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Estimate:
        return Estimate(*(times * count for count in astuple(self)))

    def line(self, prices: Prices | None = None) -> str:
        """Format the counts as one line, with the cost if prices are given."""
        dollars = ""
        if prices is not None:
            dollars = f", at most ${prices.dollars(self.prompt_tokens, self.completion_tokens):.2f}"
        return (
            f"{self.requests:,} requests to send, {self.cached:,} answered before; estimate: about "
            f"{self.prompt_tokens:,} tokens to read, at most {self.completion_tokens:,} to write{dollars}"
        )


@dataclass
class Usage:
    """Counts of what a client has sent and received so far."""

    sent: int = 0  # requests that the server answered
    cached: int = 0  # requests that the cache answered
    repeated: int = 0  # attempts that failed and were repeated
    prompt_tokens: int = 0  # tokens of the requests sent, as the server counts them
    completion_tokens: int = 0  # tokens of their replies, as the server counts them
    uncounted: int = 0  # replies without token counts
    refused: int = 0  # requests that the server refused because of their content
    first_refusal: str = ""  # the reason of the first of them
    cut_off: int = 0  # replies that the server ended before the model did, if more than one token was allowed
    default_temperature: int = 0  # replies at the server's own temperature, because it refused the requested one

    @property
    def replies(self) -> int:
        """Requests with an outcome, refusals included."""
        return self.sent + self.cached + self.refused

    def add(self, reply: ChatReply) -> None:
        """Count a reply, or a refusal, from the server."""
        if reply.refused is not None:
            self.refused += 1
            self.first_refusal = self.first_refusal or reply.refused
            return
        self.sent += 1
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self.uncounted += 1
        else:
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens

    def note(self, request: ChatRequest, reply: ChatReply) -> None:
        """Count what is special about a reply, whether it was received now or in an earlier run."""
        self.cut_off += reply.cut_off and request.max_tokens > 1
        self.default_temperature += reply.default_temperature

    def line(self, prices: Prices | None = None) -> str:
        """Format the counts as one line, with the cost if prices are given."""
        text = (
            f"{self.sent:,} requests sent ({self.repeated:,} attempts repeated), {self.cached:,} answered before; "
            f"{self.prompt_tokens:,} tokens read, {self.completion_tokens:,} written"
        )
        if prices is not None:
            least = "at least " if self.uncounted else ""
            text += f", {least}${prices.dollars(self.prompt_tokens, self.completion_tokens):.2f}"
        if self.uncounted:
            text += f" ({self.uncounted:,} replies came without usage: their tokens are unknown)"
        if self.cut_off:
            text += f"; {self.cut_off:,} replies were cut off (a longer limit may help)"
        if self.default_temperature:
            text += f"; {self.default_temperature:,} replies at the server's default temperature: it refuses ours"
        if self.refused:
            text += f"; {self.refused:,} of {self.replies:,} requests refused, the first with {self.first_refusal}"
        return text


def confirm_cost(estimate: Estimate, *, yes: bool, log: Callable[[str], None], prices: Prices | None = None) -> None:
    """Log what is about to be sent, and raise :class:`SimpoError` unless the user agrees or nothing is to be sent.

    With ``yes`` the user has agreed in advance.
    """
    if estimate.requests or estimate.cached:
        log(estimate.line(prices))
    if yes or not estimate.requests:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise SimpoError("nothing was sent: there is no terminal to ask on; agree with --yes")
    try:
        answer = input("Send them? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise SimpoError("nothing was sent")
