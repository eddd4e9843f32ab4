"""Chat requests and replies: how they look on the wire, where they are sent, and with which key."""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx

from simpo.errors import SimpoError
from simpo.runs.log import is_secret
from simpo.runs.results import fingerprint

# Reasons of servers for ending a reply before the model did.
_ROUNDING = 1e-3  # a log-probability may be above 0 by this much


_CUT_OFF = ("length", "max_tokens", "model_length", "content_filter")


@dataclass(frozen=True)
class ChatRequest:
    """What a model is asked.

    Attributes:
        messages: the conversation, each with ``role`` and ``content``.
        max_tokens: longest reply.
        temperature: of sampling; 0 is greedy.
        top_logprobs: how many of the likeliest first tokens to report with their log-probabilities; None for none.
        seed: of sampling, where the server takes one.
        top_p: draw from the smallest set of tokens with this probability; None leaves it to the server.
    """

    messages: list[dict[str, str]]
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int | None = None
    seed: int | None = None
    top_p: float | None = None

    def body(self, model: str) -> dict[str, Any]:
        """What is sent to a server, as JSON."""
        body: dict[str, Any] = {
            "model": model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        for name in ("seed", "top_p"):
            if getattr(self, name) is not None:
                body[name] = getattr(self, name)
        return body

    def key(self, model: str) -> str:
        """SHA-256 of what is asked and of whom."""
        return fingerprint(self.body(model))

    def __hash__(self) -> int:
        return hash(self.key(""))


@dataclass(frozen=True)
class ChatReply:
    """What a model answered.

    Attributes:
        text: of the message; empty if it has none.
        first_token_logprobs: the likeliest first tokens with their log-probabilities in nats; None where they were
            not asked for or the server does not give them.
        finish_reason: why it ended, in the server's word.
        prompt_tokens: tokens of the request; None where the server does not say.
        completion_tokens: tokens of the reply; None where the server does not say.
        refused: why the server would not answer this request, and the text is empty; None if it did.
        default_temperature: whether the server chose the temperature, because it refused the one that was asked for.
    """

    text: str
    first_token_logprobs: dict[str, float] | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    refused: str | None = None
    default_temperature: bool = False

    @property
    def cut_off(self) -> bool:
        """Whether it ended before the model had said everything."""
        return (self.finish_reason or "").lower() in _CUT_OFF

    @property
    def whole_text(self) -> str:
        """The text; empty if it was cut off, so that no verdict is read from half a reply."""
        return "" if self.cut_off else self.text


def read_reply(content: bytes) -> ChatReply:
    """The reply in the body of a server's response.

    Raises:
        ValueError: it is not JSON, or not a chat completion; says what is wrong in a few words.
    """
    document = json.loads(content, parse_constant=_refuse)
    if isinstance(document, dict) and document.get("error"):
        raise ValueError(f"an error instead of a completion: {error_text(document)}")
    try:
        choice = document["choices"][0]
        text = _text(choice["message"].get("content"))
        usage = document.get("usage") or {}
        reply = ChatReply(
            text,
            _first_token(choice.get("logprobs")),
            choice.get("finish_reason"),
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion ({type(error).__name__}: {error})") from error
    return reply


def _text(content: Any) -> str:
    """The text of a message, whose content may be a list of parts; parts with reasoning are no part of it.

    Raises:
        TypeError: it holds something other than text and reasoning.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError(f"its content is of type {type(content).__name__}")
    return "".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else "text" if isinstance(part, str) else type(part).__name__
    if kind in ("thinking", "redacted_thinking", "reasoning"):
        return ""
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
    if kind not in ("text", "output_text", "refusal") or not isinstance(text, str):
        raise TypeError(f"its content has a part of type {kind!r} without text")
    return text


def error_text(document: Any) -> str:
    """What a server says went wrong, in one line."""
    said = document.get("error", document) if isinstance(document, dict) else document
    said = said.get("message", said) if isinstance(said, dict) else said
    return " ".join(str(said).split())


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _first_token(logprobs: Any) -> dict[str, float] | None:
    tokens = logprobs.get("content") if logprobs else None
    if not tokens:
        return None
    found: dict[str, float] = {}
    for candidate in tokens[0].get("top_logprobs") or ():
        logprob = candidate["logprob"]
        if not isinstance(logprob, int | float) or logprob > _ROUNDING:
            raise ValueError(f"a log-probability of {logprob!r}")
        found.setdefault(candidate["token"], min(0.0, float(logprob)))  # the likelier of two alike comes first
    return found or None


# ---- Where chat requests go, and the key that goes with them.


_AZURE = (".azure.com", ".azure.us", ".azure.cn", ".microsoft.com")


_COMPLETIONS = "/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible interface.

    Attributes:
        base_url: what stands before ``/chat/completions``, e.g. ``https://api.openai.com/v1``. A query, such as Azure's
            ``?api-version=...``, is kept.
        model: its name there.
        api_key_env: environment variable that holds the key; a server on this machine needs none.
        concurrency: requests at a time.
        timeout: seconds that one attempt may take, from the connection to the last byte.
        attempts: how often a request is sent at most.

    Raises:
        SimpoError: a value that cannot be used; names the field.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 6

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            # httpx is who will read it, and is stricter with names of hosts.
            usable = parts.scheme in ("http", "https") and bool(httpx.URL(self.base_url).host) and parts.port != 0
        except (ValueError, httpx.InvalidURL):
            raise SimpoError(f"base_url: {_bare(self.base_url)!r} is not a URL") from None
        if "@" in parts.netloc:
            raise SimpoError("base_url: a URL with a user or password in it; keys come from the environment")
        if any(is_secret(name) or name in ("key", "sig", "code") for name, _ in parse_qsl(parts.query)):
            raise SimpoError("base_url: a URL with a key in its query; keys come from the environment")
        if not usable or parts.fragment:
            raise SimpoError(f"base_url: {self.base_url!r} is not of the form http(s)://host[:port]/path[?query]")
        if not self.model:
            raise SimpoError("model: no name; give the name that the server knows the model by")
        # What else it may be is a key, which is not to be repeated.
        if not (self.api_key_env.isidentifier() and self.api_key_env.isupper()):
            raise SimpoError("api_key_env: give not the key but the name, in capitals, of the variable that holds it")
        for key, least in (("concurrency", 1), ("attempts", 1)):
            if getattr(self, key) < least:
                raise SimpoError(f"{key}: must be at least {least}, not {getattr(self, key)}")
        if not self.timeout > 0:
            raise SimpoError(f"timeout: must be above 0 seconds, not {self.timeout}")

    @property
    def url(self) -> str:
        """Where requests are sent."""
        parts = urlsplit(self.base_url)
        path = parts.path.rstrip("/").removesuffix(_COMPLETIONS) + _COMPLETIONS
        return urlunsplit(parts._replace(path=path))

    def authorization(self, key: str) -> dict[str, str]:
        """The header that carries the key: ``api-key`` for Azure, which its host or the version in its URL shows."""
        parts = urlsplit(self.base_url)
        azure = (parts.hostname or "").endswith(_AZURE) or "api-version" in dict(parse_qsl(parts.query))
        return {"api-key": key} if azure else {"authorization": f"Bearer {key}"}

    @property
    def place(self) -> str:
        """Server and model, for messages."""
        return f"{self.url}: model {self.model!r}"

    @property
    def local(self) -> bool:
        """Whether the server is on this machine."""
        host = urlsplit(self.base_url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def api_key(self) -> str | None:
        """The key; None if there is none and none is needed.

        Raises:
            SimpoError: the server is elsewhere and the variable is not set, or what it holds is no key.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and not self.local:
            raise SimpoError(f"{self.url}: no key: set the environment variable {self.api_key_env}")
        if not (key.isascii() and key.isprintable()):
            raise SimpoError(f"{self.api_key_env}: the environment variable holds characters that no key has")
        return key or None


def _bare(url: str) -> str:
    """A URL without a user and password."""
    return url.rpartition("@")[2]
