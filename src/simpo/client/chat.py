"""A chat request and its reply, and how both look on the wire."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from simpo.results import fingerprint

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
