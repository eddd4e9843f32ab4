"""Chat requests and replies, the endpoint they are sent to, and their cost."""

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
    """A single request to a chat model."""

    messages: list[dict[str, str]]  # the conversation, each message with `role` and `content`
    max_tokens: int  # maximum length of the reply
    temperature: float = 0.0  # sampling temperature; 0 is greedy
    top_logprobs: int | None = None  # report log-probabilities for this many of the likeliest first tokens
    seed: int | None = None  # sampling seed, for servers that accept one
    top_p: float | None = None  # nucleus sampling; None uses the server's default

    def body(self, model: str) -> dict[str, Any]:
        """Return the JSON body of the HTTP request."""
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
        """Return the SHA-256 of the body, which is the request's key in the cache."""
        return fingerprint(self.body(model))


@dataclass(frozen=True)
class ChatReply:
    """A model's reply."""

    text: str  # content of the message; may be empty
    # Log-probabilities of the likeliest first tokens, in nats; None if they were not requested or not reported.
    first_token_logprobs: dict[str, float] | None = None
    finish_reason: str | None = None  # why the reply ended, in the server's terms
    prompt_tokens: int | None = None  # tokens in the request; None if the server does not report them
    completion_tokens: int | None = None  # tokens in the reply; None if the server does not report them
    refused: str | None = None  # why the server refused the request (the text is then empty); None if it did not
    default_temperature: bool = False  # the server refused the requested temperature and used its own

    @property
    def cut_off(self) -> bool:
        """Whether the server ended the reply before the model did."""
        return (self.finish_reason or "").lower() in ("length", "max_tokens", "model_length", "content_filter")

    @property
    def complete_text(self) -> str:
        """The text, or an empty string if it was cut off: a verdict is never read from an incomplete reply."""
        return "" if self.cut_off else self.text


def read_reply(content: bytes) -> ChatReply:
    """Parse the body of a server's response; raises :class:`SimpoError` if it is not a chat completion."""
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
    """Return the error message in a server's response as one line."""
    message = document.get("error", document) if isinstance(document, dict) else document
    message = message.get("message", message) if isinstance(message, dict) else message
    return " ".join(str(message).split())


def _text(content: Any) -> str:
    """Join the text parts of a message and skip its reasoning; raises ``TypeError`` for any other kind of part."""
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
    by_token: dict[str, float] = {}
    for candidate in tokens[0].get("top_logprobs") or ():
        logprob = candidate["logprob"]
        # Some servers round to slightly above 0, and a JSON integer can be too large for a float.
        if not isinstance(logprob, int | float) or not -sys.float_info.max <= logprob <= 1e-3:
            raise ValueError(f"invalid log-probability {reprlib.repr(logprob)}")
        # Different tokens can decode to the same text; the list is sorted, so the first is the likeliest.
        by_token.setdefault(candidate["token"], min(0.0, float(logprob)))
    return by_token or None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


@dataclass(frozen=True)
class Endpoint:
    """A model served through an OpenAI-compatible API.

    Attributes:
        base_url: everything before ``/chat/completions``, e.g. ``https://api.openai.com/v1``. A query string, such as
            Azure's ``?api-version=...``, is preserved.
        model: the model's name on the server.
        api_key_env: environment variable that holds the API key; servers on this machine do not need one.
        concurrency: maximum number of requests in flight.
        timeout: seconds allowed for one attempt, from connecting to the last byte.
        attempts: maximum number of times a request is sent.

    Raises:
        SimpoError: a field has an invalid value; the message names the field.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 8  # about half a minute in total with openai's backoff

    def __post_init__(self) -> None:
        # The text before an @ may be a password and must not appear in a message.
        shown = self.base_url.rpartition("@")[2]
        try:
            parts = urlsplit(self.base_url)
            # httpx makes the requests and is stricter about host names than urllib.
            usable = parts.scheme in ("http", "https") and bool(httpx.URL(self.base_url).host) and parts.port != 0
        except Exception:  # "from None" because the library's message may quote the password
            raise SimpoError(f"base_url: {shown!r} is not a URL") from None
        if "@" in parts.netloc:
            raise SimpoError("base_url: the URL contains a user name or password; put the key in the environment")
        if any(is_secret(name) or name in ("key", "sig", "code") for name, _ in parse_qsl(parts.query)):
            raise SimpoError("base_url: the URL's query contains a key; put the key in the environment")
        if not usable or parts.fragment:
            raise SimpoError(f"base_url: {shown!r} is not of the form http(s)://host[:port]/path[?query]")
        if not self.model:
            raise SimpoError("model: is empty; give the model's name on the server")
        # Anything else may be the key itself, so it must not appear in the message.
        if not (self.api_key_env.isidentifier() and self.api_key_env.isupper()):
            raise SimpoError(
                "api_key_env: expected the name of an environment variable in capitals, not the key itself"
            )
        for key in ("concurrency", "attempts"):
            if getattr(self, key) < 1:
                raise SimpoError(f"{key}: must be at least 1, not {getattr(self, key)}")
        if not self.timeout > 0:
            raise SimpoError(f"timeout: must be above 0 seconds, not {self.timeout}")

    @property
    def url(self) -> str:
        """The full URL of the chat completions endpoint."""
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
        """Return the API key, or None if a local server has none; raises :class:`SimpoError` if missing or invalid."""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and not self.is_local:
            raise SimpoError(f"{self.url}: no API key; set the environment variable {self.api_key_env}")
        if not (key.isascii() and key.isprintable()):
            raise SimpoError(f"{self.api_key_env}: the environment variable contains characters not allowed in a key")
        return key or None

    def authorization(self, key: str) -> dict[str, str]:
        """Return the header for the key: ``api-key`` for Azure, which is recognized by host or ``api-version``."""
        parts = urlsplit(self.base_url)
        hosts = (".azure.com", ".azure.us", ".azure.cn", ".microsoft.com")
        azure = (parts.hostname or "").endswith(hosts) or "api-version" in dict(parse_qsl(parts.query))
        return {"api-key": key} if azure else {"Authorization": f"Bearer {key}"}


# ---- The cost of requests: an estimate before they are sent, a count afterwards.

_CHARACTERS_PER_TOKEN = 4  # approximate for English text


def placeholder_answer(tokens: int, name: str = "") -> str:
    """Return a dummy text that is estimated at ``tokens`` tokens; a different ``name`` gives a different text."""
    return name.ljust(_CHARACTERS_PER_TOKEN * tokens, ".")


@dataclass(frozen=True)
class Prices:
    """Prices of a model in dollars per million tokens, for the ``prompt`` and the ``completion``."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for price in (self.prompt, self.completion):
            if not 0 <= price < math.inf:
                raise SimpoError(f"prices: {price:g} is not a price in dollars per million tokens")

    def dollars(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of that many tokens in dollars."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass(frozen=True)
class Estimate:
    """Number and size of the requests that are about to be sent."""

    requests: int = 0  # requests to send
    cached: int = 0  # requests already answered in the cache
    prompt_tokens: int = 0  # approximate, at four characters per token
    completion_tokens: int = 0  # upper bound: the sum of `max_tokens`

    @classmethod
    def of(cls, missing: Iterable[ChatRequest], cached: int) -> Self:
        """Return the estimate for ``missing`` requests when ``cached`` others are already answered."""
        sent = list(missing)
        characters = sum(len(message["content"]) for request in sent for message in request.messages)
        longest = sum(request.max_tokens for request in sent)
        return cls(len(sent), cached, math.ceil(characters / _CHARACTERS_PER_TOKEN), longest)

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Estimate:
        return Estimate(*(times * count for count in astuple(self)))

    def line(self, prices: Prices | None = None) -> str:
        """Format the estimate as one line, with the cost if prices are given."""
        dollars = ""
        if prices is not None:
            dollars = f", at most ${prices.dollars(self.prompt_tokens, self.completion_tokens):.2f}"
        return (
            f"{self.requests:,} requests to send, {self.cached:,} in the cache; estimate: about "
            f"{self.prompt_tokens:,} prompt tokens and at most {self.completion_tokens:,} completion tokens{dollars}"
        )


@dataclass
class Usage:
    """Running totals of a client's requests and replies."""

    sent: int = 0  # requests answered by the server
    cached: int = 0  # requests answered from the cache
    repeated: int = 0  # failed attempts that were retried
    prompt_tokens: int = 0  # as counted by the server
    completion_tokens: int = 0  # as counted by the server
    uncounted: int = 0  # replies without token counts
    refused: int = 0  # requests refused because of their content
    first_refusal: str = ""  # the server's reason for the first refusal
    cut_off: int = 0  # truncated replies, except to requests for a single token
    default_temperature: int = 0  # replies sampled at the server's own temperature because it refused ours

    @property
    def replies(self) -> int:
        """Number of requests with an outcome, including refusals."""
        return self.sent + self.cached + self.refused

    def add(self, reply: ChatReply) -> None:
        """Count a reply or refusal from the server."""
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
        """Count truncation and a default temperature, for new and cached replies alike."""
        self.cut_off += reply.cut_off and request.max_tokens > 1
        self.default_temperature += reply.default_temperature

    def line(self, prices: Prices | None = None) -> str:
        """Format the counts as one line, with the cost if prices are given."""
        text = (
            f"{self.sent:,} requests sent ({self.repeated:,} retries), {self.cached:,} answered from the cache; "
            f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens"
        )
        if prices is not None:
            least = "at least " if self.uncounted else ""
            text += f", {least}${prices.dollars(self.prompt_tokens, self.completion_tokens):.2f}"
        if self.uncounted:
            text += f" ({self.uncounted:,} replies reported no token counts)"
        if self.cut_off:
            text += f"; {self.cut_off:,} replies were cut off (a higher token limit may help)"
        if self.default_temperature:
            text += f"; {self.default_temperature:,} replies at the server's default temperature, as it refused ours"
        if self.refused:
            text += f"; {self.refused:,} of {self.replies:,} requests refused, the first with {self.first_refusal}"
        return text


def confirm_cost(estimate: Estimate, *, yes: bool, log: Callable[[str], None], prices: Prices | None = None) -> None:
    """Log the estimate and ask the user to confirm it; raises :class:`SimpoError` if they decline or cannot be asked.

    There is no question if ``yes`` is true or nothing needs to be sent.
    """
    if estimate.requests or estimate.cached:
        log(estimate.line(prices))
    if yes or not estimate.requests:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise SimpoError("nothing was sent: no terminal to ask for confirmation; pass --yes to agree in advance")
    try:
        answer = input("Send them? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise SimpoError("nothing was sent")
