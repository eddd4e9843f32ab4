"""Chat requests and replies as they are sent over HTTP, the endpoint that they are sent to, and what they cost."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any, NoReturn, Self
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx

from simpo.errors import SimpoError, third_party
from simpo.runs.log import is_secret
from simpo.runs.results import fingerprint


@dataclass(frozen=True)
class ChatRequest:
    """One request to a chat model."""

    messages: list[dict[str, str]]  # the conversation, each message with `role` and `content`
    max_tokens: int  # longest reply
    temperature: float = 0.0  # sampling temperature; 0 is greedy
    # How many of the likeliest first tokens to report with their log-probabilities; None for none.
    top_logprobs: int | None = None
    seed: int | None = None  # sampling seed, for servers that accept one
    # Draw from the smallest set of tokens with this probability; None leaves it to the server.
    top_p: float | None = None

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body that is sent to the server."""
        body: dict[str, Any] = {
            "model": model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return body | {name: value for name in ("seed", "top_p") if (value := getattr(self, name)) is not None}

    def key(self, model: str) -> str:
        """SHA-256 of the body: identifies the request in the cache."""
        return fingerprint(self.body(model))


@dataclass(frozen=True)
class ChatReply:
    """A model's reply."""

    text: str  # content of the message; may be empty
    # The likeliest first tokens with their log-probabilities in nats; None if they were not requested or the server
    # does not report them.
    first_token_logprobs: dict[str, float] | None = None
    finish_reason: str | None = None  # why the reply ended, as the server names it
    prompt_tokens: int | None = None  # tokens of the request; None if the server does not report them
    completion_tokens: int | None = None  # tokens of the reply; None if the server does not report them
    # Why the server refused this request, in which case the text is empty; None if it did not.
    refused: str | None = None
    default_temperature: bool = False  # the server used its own temperature, because it refused the requested one

    @property
    def cut_off(self) -> bool:
        """Whether the server ended the reply before the model did."""
        return (self.finish_reason or "").lower() in ("length", "max_tokens", "model_length", "content_filter")

    @property
    def complete_text(self) -> str:
        """The text; empty if it was cut off, so that no verdict is read from an incomplete reply."""
        return "" if self.cut_off else self.text


def read_reply(content: bytes) -> ChatReply:
    """Parse the body of a server's response."""
    with third_party("not JSON"):
        document = json.loads(content, parse_constant=_refuse_constant)
    if isinstance(document, dict) and document.get("error"):
        raise SimpoError(f"an error instead of a completion: {error_text(document)}")
    with third_party("not a chat completion"):
        choice = document["choices"][0]
        text = _text(choice["message"].get("content"))
        usage = document.get("usage") or {}
        prompt, completion = (usage.get(f"{part}_tokens") for part in ("prompt", "completion"))
        return ChatReply(
            text,
            _first_token(choice.get("logprobs")),
            choice.get("finish_reason"),
            prompt if isinstance(prompt, int) else None,
            completion if isinstance(completion, int) else None,
        )


def error_text(document: Any) -> str:
    """The error message in a server's response, on one line."""
    message = document.get("error", document) if isinstance(document, dict) else document
    message = message.get("message", message) if isinstance(message, dict) else message
    return " ".join(str(message).split())


def _text(content: Any) -> str:
    """The text of a message, whose content may be a list of parts; parts with reasoning are left out.

    Anything but text and reasoning raises ``TypeError``.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError(f"its content is of type {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else "text" if isinstance(part, str) else type(part).__name__
        if kind in ("thinking", "redacted_thinking", "reasoning"):
            continue
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
        if kind not in ("text", "output_text", "refusal") or not isinstance(text, str):
            raise TypeError(f"its content has a part of type {kind!r} without text")
        texts.append(text)
    return "".join(texts)


def _first_token(logprobs: Any) -> dict[str, float] | None:
    tokens = logprobs.get("content") if logprobs else None
    if not tokens:
        return None
    found: dict[str, float] = {}
    for candidate in tokens[0].get("top_logprobs") or ():
        logprob = candidate["logprob"]
        # Some servers round to slightly above 0; a whole number may have more digits than a float can hold.
        if not isinstance(logprob, int | float) or not -sys.float_info.max <= logprob <= 1e-3:
            raise ValueError(f"a log-probability of {reprlib.repr(logprob)}")
        # Different tokens may have the same text; the likelier one comes first.
        found.setdefault(candidate["token"], min(0.0, float(logprob)))
    return found or None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible interface.

    Attributes:
        base_url: everything before ``/chat/completions``, e.g. ``https://api.openai.com/v1``. A query, such as Azure's
            ``?api-version=...``, is kept.
        model: the model's name on the server.
        api_key_env: environment variable with the key; a server on this machine needs none.
        concurrency: requests at a time.
        timeout: seconds for one attempt, from the connection to the last byte.
        attempts: how often a request is sent at most.

    Raises:
        SimpoError: a value that cannot be used; names the field.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 8  # with openai's waits, half a minute in all

    def __post_init__(self) -> None:
        # The text before an @ may be a password and must not be repeated.
        shown = self.base_url.rpartition("@")[2]
        try:
            parts = urlsplit(self.base_url)
            # httpx, which will use the URL, is stricter about host names than urllib.
            usable = parts.scheme in ("http", "https") and bool(httpx.URL(self.base_url).host) and parts.port != 0
        except Exception:  # of the libraries, whose message may quote what was hidden
            raise SimpoError(f"base_url: {shown!r} is not a URL") from None
        if "@" in parts.netloc:
            raise SimpoError("base_url: a URL with a user or password in it; keys come from the environment")
        if any(is_secret(name) or name in ("key", "sig", "code") for name, _ in parse_qsl(parts.query)):
            raise SimpoError("base_url: a URL with a key in its query; keys come from the environment")
        if not usable or parts.fragment:
            raise SimpoError(f"base_url: {shown!r} is not of the form http(s)://host[:port]/path[?query]")
        if not self.model:
            raise SimpoError("model: no name; give the model's name on the server")
        # A value of another form may be the key itself, so it is not repeated.
        if not (self.api_key_env.isidentifier() and self.api_key_env.isupper()):
            raise SimpoError(
                "api_key_env: give the name, in capitals, of the environment variable that holds the key, not the key"
            )
        for key in ("concurrency", "attempts"):
            if getattr(self, key) < 1:
                raise SimpoError(f"{key}: must be at least 1, not {getattr(self, key)}")
        if not self.timeout > 0:
            raise SimpoError(f"timeout: must be above 0 seconds, not {self.timeout}")

    @property
    def url(self) -> str:
        """The URL that requests are sent to."""
        parts = urlsplit(self.base_url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        return urlunsplit(parts._replace(path=path))

    @property
    def label(self) -> str:
        """Server and model, for messages."""
        return f"{self.url}: model {self.model!r}"

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        host = urlsplit(self.base_url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def api_key(self) -> str | None:
        """The key; None if there is none and none is needed."""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and not self.is_local:
            raise SimpoError(f"{self.url}: no key: set the environment variable {self.api_key_env}")
        if not (key.isascii() and key.isprintable()):
            raise SimpoError(f"{self.api_key_env}: the environment variable holds characters that no key has")
        return key or None

    def authorization(self, key: str) -> dict[str, str]:
        """The header that carries the key: ``api-key`` for Azure, recognized by its host or version in the URL."""
        parts = urlsplit(self.base_url)
        hosts = (".azure.com", ".azure.us", ".azure.cn", ".microsoft.com")
        azure = (parts.hostname or "").endswith(hosts) or "api-version" in dict(parse_qsl(parts.query))
        return {"api-key": key} if azure else {"Authorization": f"Bearer {key}"}


# ---- The cost of requests: estimated before they are sent, counted afterwards.

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
