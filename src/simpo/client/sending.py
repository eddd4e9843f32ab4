"""Sends chat requests through openai's client, adding shared backoff, size limits and parameter fallbacks."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, Omit

from simpo.client.chat import ChatReply, ChatRequest, Endpoint, error_text, read_reply
from simpo.errors import SimpoError, third_party
from simpo.runs.log import REDACTED, mask_secrets

_MAX_WAIT = 300.0  # seconds; if a server asks for more, the request fails
_MAX_REASON = 300  # characters
_MAX_REPLY_BYTES = 32 << 20  # bytes
_MAX_QUOTED = 1 << 16  # characters of an error that are searched for secrets before it is cut to _MAX_REASON
# Too long, filtered or malformed. Any other refusal would apply to every request.
_REFUSAL_STATUSES = (400, 413, 422)

# Errors that neither waiting nor a different request can fix, whatever their status.
_QUOTA_ERRORS = ("insufficient_quota", "billing_hard_limit_reached", "credit balance is too low")

# How servers report that a model does not accept a parameter or its value.
_UNSUPPORTED = re.compile(
    r"unsupported|(?:not|n't)\W+support|not permitted|not allowed|unrecognized|unexpected|deprecated|extra_forbidden"
    r"|only\W.{0,40}\b(?:allowed|supported|accepted)",
    re.IGNORECASE,
)


class RefusedRequestError(SimpoError):
    """The server refused one request because of its content, but may answer others; ``reason`` is its message."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Dialect:
    """Which parameters a model accepts, learned from its refusals.

    OpenAI's newer models take ``max_completion_tokens`` instead of ``max_tokens`` and only their default temperature.
    """

    exact_temperature: bool  # never drop a temperature other than 1, the API's default
    refused: frozenset[str] = frozenset()  # parameters the server has refused so far

    def adapt(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body without the parameters that the server refuses."""
        body = dict(body)
        if "max_tokens" in self.refused and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if "temperature" in self.refused and not (self.exact_temperature and body.get("temperature") != 1):
            body.pop("temperature", None)
        return body

    def learn(self, parameter: str | None, body: dict[str, Any]) -> bool:
        """Remember a refused parameter of ``body``, and return whether the request can now be sent differently."""
        self.refused |= {parameter} if parameter else set()
        return parameter in body and self.adapt(body) != body


class _HttpClient(httpx.AsyncClient):
    """The HTTP client underneath openai's client.

    It pauses all requests when the server asks for a pause (openai pauses only the one that was refused) and limits the
    duration of a whole attempt (httpx limits the time between bytes). So that openai retries the right attempts,
    unreadable replies become transport errors and permanent refusals are marked as final.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        # Proxies from the environment are not meant for a server on this machine.
        super().__init__(timeout=None, limits=limits, trust_env=not endpoint.is_local)
        self._seconds = endpoint.timeout
        self._paused_until = 0.0  # in terms of time.monotonic()
        self.repeated = 0  # failed attempts that were retried

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Make one attempt; the parsed reply is in the response's ``extensions``."""
        while (pause := self._paused_until - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        self.repeated += _attempts(request) > 1
        request.headers["accept-encoding"] = "identity"
        try:
            async with asyncio.timeout(self._seconds):
                response = await _read_limited(await super().send(request, **options | {"stream": True}))
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"no reply within {self._seconds:g} s", request=request) from error
        if response.is_success:
            try:
                response.extensions["reply"] = read_reply(response.content)
            except SimpoError as error:
                raise httpx.DecodingError(f"unreadable reply: {error}", request=request) from error
            return response
        wait = _retry_after(response)
        if wait > _MAX_WAIT or _quota_exceeded(response):
            response.headers["x-should-retry"] = "false"
        elif wait:
            self._paused_until = max(self._paused_until, time.monotonic() + wait)
            del response.headers["retry-after"]  # openai gives up if it asks for more than two minutes
        return response


async def _read_limited(response: httpx.Response) -> httpx.Response:
    """Read a response into memory as UTF-8.

    More than ``_MAX_REPLY_BYTES`` bytes cannot be a chat reply and become an error that is not retried. So does a
    compressed reply, which was not asked for: a few kilobytes could expand to gigabytes before they can be counted.
    """
    parts, size, status, fault = [], 0, response.status_code, None
    headers = {name: value for name, value in response.headers.items() if name in ("retry-after", "x-should-retry")}
    if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
        fault = f"the reply is compressed ({encoding:.40}), which the request does not allow"
    else:
        async for part in response.aiter_raw(1 << 16):
            parts.append(part)
            size += len(part)
            if size > _MAX_REPLY_BYTES:
                fault = f"the reply is larger than {_MAX_REPLY_BYTES >> 20} MiB"
                break
    await response.aclose()
    content = b"".join(parts)
    if fault is not None:
        status, headers, content = 502, {"x-should-retry": "false"}, fault.encode()
    headers["content-type"] = "application/json"  # ignore the server's charset, which can be any Python codec
    return httpx.Response(status, headers=headers, content=content, request=response.request)


class Sender:
    """Sends requests over one connection pool; use it as an asynchronous context manager.

    Raises:
        SimpoError: the server needs a key and there is none, or the environment's proxy or certificates are unusable.
    """

    def __init__(self, endpoint: Endpoint, dialect: Dialect) -> None:
        self._endpoint, self._dialect, self._key = endpoint, dialect, endpoint.api_key()
        self._adapted = 0
        with third_party(f"{endpoint.url}: the environment's proxy or certificates (*_PROXY, SSL_CERT_*)"):
            self._http = _HttpClient(endpoint)
        # Without these, openai would send OPENAI_API_KEY, OPENAI_ORG_ID and OPENAI_PROJECT_ID to any server.
        self._headers: dict[str, str | Omit] = dict.fromkeys(
            ("Authorization", "OpenAI-Organization", "OpenAI-Project"), Omit()
        )
        if self._key is not None:
            self._headers.update(endpoint.authorization(self._key))
        self._openai = AsyncOpenAI(
            api_key="none",
            base_url=endpoint.base_url,
            timeout=None,
            max_retries=endpoint.attempts - 1,
            http_client=cast(Any, self._http),  # typed as httpx2's since openai 3, which still accepts httpx's
        )

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._openai.close()

    @property
    def repeated(self) -> int:
        """Number of retries, including those with other parameters."""
        return self._http.repeated + self._adapted

    async def send(self, request: ChatRequest) -> ChatReply:
        """Send a request, retrying until there is a reply.

        Raises:
            RefusedRequestError: the server refuses this request (status 400, 413 or 422).
            SimpoError: all attempts failed, or the server refuses every request.
        """
        while True:
            body = self._dialect.adapt(request.body(self._endpoint.model))
            try:
                # Encoded here because openai's encoder fails on lone surrogates.
                content = json.dumps(body).encode()
                response = await self._openai.post(
                    self._endpoint.url, body=content, cast_to=httpx.Response, options={"headers": self._headers}
                )
            except APIStatusError as error:
                if not self._dialect.learn(_unsupported(error.response), body):
                    # "from None" because the original error may contain the key.
                    raise self._status_error(error.response) from None
                self._adapted += 1
            except APIConnectionError as error:
                cause = error.__cause__ or error
                reason = self._one_safe_line(str(cause) or type(cause).__name__)
                raise SimpoError(self._message(reason, error.request)) from None
            else:
                default = request.temperature != 1 and "temperature" not in body
                reply = response.extensions["reply"]
                return replace(reply, text=self._redact_key(reply.text), default_temperature=default)

    def _status_error(self, response: Any) -> SimpoError:
        text = error_text(_json_or_text(response)) or response.reason_phrase
        reason = self._one_safe_line(f"status {response.status_code}: {text}")
        message = self._message(reason, response.request)
        if (wait := _retry_after(response)) > _MAX_WAIT:
            message += f"; it asks for a wait of {wait:,.0f} s"
        if _unsupported(response) == "temperature" and self._dialect.exact_temperature:
            message += "; it supports only its default temperature: use --temperature 1"
        if response.status_code in _REFUSAL_STATUSES and not _quota_exceeded(response):
            return RefusedRequestError(message, reason)
        return SimpoError(message)

    def _message(self, reason: str, request: Any) -> str:
        attempts = _attempts(request)
        return f"{self._endpoint.label}: {reason}" + (f" ({attempts} attempts)" if attempts > 1 else "")

    def _one_safe_line(self, text: str) -> str:
        """Return the text as one line without secrets, since a server may echo the key in its error."""
        line = self._redact_key(" ".join(text[:_MAX_QUOTED].split()))
        return line[:_MAX_REASON]  # after redaction, because half a key is not recognized

    def _redact_key(self, text: str) -> str:
        for form in (str, repr, json.dumps):  # an error may quote the key with Python's or JSON's escapes
            if self._key is not None:
                text = text.replace(form(self._key).strip("\"'"), REDACTED)
        return mask_secrets(text)


def _attempts(request: Any) -> int:
    """Return how many times a request has been sent, from the header in which openai counts retries."""
    return 1 + int(request.headers.get("x-stainless-retry-count", 0))


def _quota_exceeded(response: Any) -> bool:
    return any(sign in response.text for sign in _QUOTA_ERRORS)


def _retry_after(response: Any) -> float:
    """Return the Retry-After header, a number or a date, in seconds from now; 0 if there is none."""
    value = response.headers.get("retry-after", "0")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _json_or_text(response: Any) -> Any:
    with suppress(SimpoError), third_party("an error's text"):
        return response.json()
    return response.text


def _unsupported(response: Any) -> str | None:
    """Return which parameter the server refuses, ``max_tokens`` or ``temperature``; None for any other error."""
    if response.status_code not in _REFUSAL_STATUSES or not _UNSUPPORTED.search(response.text):
        return None
    document = _json_or_text(response)
    error = document.get("error") if isinstance(document, dict) else None
    named = error.get("param") if isinstance(error, dict) else None
    for name in ("max_tokens", "temperature"):
        if named == name or (not named and re.search(rf"\b{name}\b", response.text)):
            return name
    return None
