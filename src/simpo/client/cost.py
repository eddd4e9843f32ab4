"""What requests cost: estimated before, counted after."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Self

from simpo.client.chat import ChatReply, ChatRequest
from simpo.errors import SimpoError

_CHARACTERS = 4  # a token of English text, about


def stand_in(tokens: int, name: str = "") -> str:
    """A text that is estimated to have so many tokens, for one that is not there yet; with another name another one."""
    return name.ljust(_CHARACTERS * tokens, ".")


@dataclass(frozen=True)
class Prices:
    """What a model costs, in dollars a million tokens.

    Attributes:
        prompt: tokens that are sent.
        completion: tokens that are received.
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for price in (self.prompt, self.completion):
            if not 0 <= price < math.inf:
                raise SimpoError(f"prices: {price:g} dollars a million tokens is no price")

    def dollars(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of these numbers of tokens, in dollars."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What is about to be sent.

    Attributes:
        requests: number of requests that will be sent.
        cached: number of requests whose replies are in the cache.
        prompt_tokens: approximate tokens of the requests, at four characters each.
        completion_tokens: the largest possible number of tokens of the replies.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

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
    """What a client has done so far.

    Attributes:
        sent: requests that were answered by the server.
        cached: requests that were answered from the disk.
        repeated: attempts that failed and were made again.
        prompt_tokens: of the requests sent, by the server's count.
        completion_tokens: of their replies, by the server's count.
        uncounted: replies that did not say their tokens.
        refused: requests that the server would not answer because of what they hold.
        first_refusal: why, the first time.
        cut_off: replies that ended before the model did, of those that could have more than one token.
        default_temperature: replies for which the server chose the temperature, because it refused ours.
    """

    sent: int = 0
    cached: int = 0
    repeated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    refused: int = 0
    first_refusal: str = ""
    cut_off: int = 0
    default_temperature: int = 0

    def add(self, reply: ChatReply) -> None:
        """Count a reply of the server."""
        self.sent += 1
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self.uncounted += 1
        else:
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens

    @property
    def replies(self) -> int:
        """Requests that have come to an end, refusals included."""
        return self.sent + self.cached + self.refused

    def note(self, request: ChatRequest, reply: ChatReply) -> None:
        """Count what is special about a reply, whether it was sent now or before."""
        self.cut_off += reply.cut_off and request.max_tokens > 1
        self.default_temperature += reply.default_temperature

    def refuse(self, reason: str) -> None:
        """Count a request that was refused."""
        self.refused += 1
        self.first_refusal = self.first_refusal or reason

    def line(self, prices: Prices | None = None) -> str:
        """Format the counts as one line, with the cost if prices are given."""
        least = "at least " if self.uncounted else ""
        dollars = (
            "" if prices is None else f", {least}${prices.dollars(self.prompt_tokens, self.completion_tokens):.2f}"
        )
        unsaid = f" ({self.uncounted:,} replies came without usage: their tokens are unknown)" if self.uncounted else ""
        notes = f"; {self.cut_off:,} replies were cut off (a longer limit may help)" if self.cut_off else ""
        if self.default_temperature:
            notes += f"; {self.default_temperature:,} replies at the server's default temperature: it refuses ours"
        refused = ""
        if self.refused:
            refused = f"; {self.refused:,} of {self.replies:,} requests refused, the first with {self.first_refusal}"
        return (
            f"{self.sent:,} requests sent ({self.repeated:,} attempts repeated), {self.cached:,} answered before; "
            f"{self.prompt_tokens:,} tokens read, {self.completion_tokens:,} written{dollars}{unsaid}{notes}{refused}"
        )


def confirm_cost(estimate: Estimate, *, yes: bool, log: Callable[[str], None], prices: Prices | None = None) -> None:
    """Say what is about to be sent, and go on if the user agrees; nothing to send needs no agreement.

    Args:
        estimate: of all requests.
        yes: the user has agreed beforehand (``--yes``).
        log: called with the line.
        prices: of the model, where they are known.

    Raises:
        SimpoError: the user does not agree, or cannot be asked.
    """
    if estimate.requests or estimate.cached:
        log(estimate.line(prices))
    if yes or not estimate.requests:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise SimpoError("nothing was sent: nobody is there to be asked whether to go on; agree with --yes")
    if _asked("Send them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SimpoError("nothing was sent")


def _asked(question: str) -> str:
    try:
        return input(question)
    except EOFError:
        return ""
