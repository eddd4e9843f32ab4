"""Sends chat requests with openai's client, which repeats failed attempts, and adds what a batch of requests needs."""

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

_LONGEST_WAIT = 300.0  # seconds; a server that asks for more is not waited for
_LONGEST_REASON = 300  # characters
_LARGEST_REPLY = 32 << 20  # bytes
_REFUSED_REQUEST = (400, 413, 422)  # too long, filtered, not understood; other refusals would meet every request

# Errors that neither waiting nor another request would avoid, whatever their status.
_QUOTA_SPENT = ("insufficient_quota", "billing_hard_limit_reached", "credit balance is too low")

# How servers say that a model does not accept a parameter or its value.
_UNSUPPORTED = re.compile(
    r"unsupported|(?:not|n't)\W+support|not permitted|not allowed|unrecognized|unexpected|deprecated|extra_forbidden"
    r"|only\W.{0,40}\b(?:allowed|supported|accepted)",
    re.IGNORECASE,
)


class RefusedRequestError(SimpoError):
    """The server refuses this request because of its content, but may answer others; ``reason`` is its message."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Dialect:
    """The parameters that a model accepts, as learned from its refusals.

    OpenAI's newer models take ``max_completion_tokens`` instead of ``max_tokens``, and only their own temperature.
    """

    exact_temperature: bool  # never leave out a temperature other than 1, the interface's default
    refused: frozenset[str] = frozenset()  # parameters that the server has refused

    def adapt(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a request in the form that the server accepts."""
        body = dict(body)
        if "max_tokens" in self.refused and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if "temperature" in self.refused and not (self.exact_temperature and body.get("temperature") != 1):
            body.pop("temperature", None)
        return body

    def learn(self, parameter: str | None, body: dict[str, Any]) -> bool:
        """Remember a refused parameter of ``body``; True if the request can now be sent in another form."""
        self.refused |= {parameter} if parameter else set()
        return parameter in body and self.adapt(body) != body


class _Http(httpx.AsyncClient):
    """The HTTP client that openai's client sends through.

    It holds all requests back while the server asks for a pause, which openai does for one request at a time, and
    limits the time of a whole attempt, where httpx limits the time between two bytes. Unreadable replies become
    transport errors, and refusals that cannot change are marked as final, so that openai repeats the right attempts.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        # A proxy from the environment is not meant for a server on this machine.
        super().__init__(timeout=None, limits=limits, trust_env=not endpoint.is_local)
        self._seconds = endpoint.timeout
        self._quiet_until = 0.0  # seconds of time.monotonic()
        self.repeated = 0  # failed attempts that were repeated

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send one attempt; a readable reply is in the response's ``extensions``."""
        while (pause := self._quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        self.repeated += _attempts(request) > 1
        try:
            async with asyncio.timeout(self._seconds):
                response = await _read(await super().send(request, **options | {"stream": True}))
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"no answer within {self._seconds:g} s", request=request) from error
        if response.is_success:
            try:
                response.extensions["reply"] = read_reply(response.content)
            except SimpoError as error:
                raise httpx.DecodingError(f"an unreadable answer: {error}", request=request) from error
            return response
        wait = _retry_after(response)
        if wait > _LONGEST_WAIT or _quota_spent(response):
            response.headers["x-should-retry"] = "false"
        elif wait:
            self._quiet_until = max(self._quiet_until, time.monotonic() + wait)
            del response.headers["retry-after"]  # openai gives up for more than two minutes
        return response


async def _read(response: httpx.Response) -> httpx.Response:
    """A response that has been read, as UTF-8 and in no more than ``_LARGEST_REPLY`` bytes.

    A larger one becomes an error that is not repeated, because it is no reply to a chat request.
    """
    content, status = b"", response.status_code
    headers = {name: value for name, value in response.headers.items() if name in ("retry-after", "x-should-retry")}
    async for part in response.aiter_bytes(1 << 16):
        content += part
        if len(content) > _LARGEST_REPLY:
            await response.aclose()
            status, headers = 502, {"x-should-retry": "false"}
            content = f"its reply has more than {_LARGEST_REPLY >> 20} MiB".encode()
            break
    headers["content-type"] = "application/json"  # and not an encoding that Python may know for other purposes
    return httpx.Response(status, headers=headers, content=content, request=response.request)


class Sender:
    """Sends requests over one pool of connections; an asynchronous context manager.

    Raises:
        SimpoError: there is no key and the server needs one, or the environment's proxy or certificates cannot be used.
    """

    def __init__(self, endpoint: Endpoint, dialect: Dialect) -> None:
        self._endpoint, self._dialect, self._key = endpoint, dialect, endpoint.api_key()
        self._adapted = 0
        with third_party(f"{endpoint.url}: the environment's proxy or certificates (*_PROXY, SSL_CERT_*)"):
            self._http = _Http(endpoint)
        # openai reads OPENAI_API_KEY, OPENAI_ORG_ID and OPENAI_PROJECT_ID, and would send them to any server.
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
            http_client=cast(Any, self._http),  # its type is httpx2's since openai 3, which accepts httpx's as well
        )

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._openai.close()

    @property
    def repeated(self) -> int:
        """Attempts that were repeated, including those in another form."""
        return self._http.repeated + self._adapted

    async def send(self, request: ChatRequest) -> ChatReply:
        """Send a request until there is a reply.

        Raises:
            RefusedRequestError: the server refuses this request (status 400, 413 or 422).
            SimpoError: there is no reply after all attempts, or the server refuses every request.
        """
        while True:
            body = self._dialect.adapt(request.body(self._endpoint.model))
            try:
                # As bytes, because openai's encoder fails on half of a surrogate pair.
                content = json.dumps(body).encode()
                response = await self._openai.post(
                    self._endpoint.url, body=content, cast_to=httpx.Response, options={"headers": self._headers}
                )
            except APIStatusError as error:
                if not self._dialect.learn(_unsupported(error.response), body):
                    # Not "from error", whose text may contain the key.
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
        text = error_text(_document(response)) or response.reason_phrase
        reason = self._one_safe_line(f"status {response.status_code}: {text}")
        message = self._message(reason, response.request)
        if (wait := _retry_after(response)) > _LONGEST_WAIT:
            message += f"; it asks to wait {wait:,.0f} s"
        if _unsupported(response) == "temperature" and self._dialect.exact_temperature:
            message += "; it samples at its own temperature only: ask for --temperature 1"
        if response.status_code in _REFUSED_REQUEST and not _quota_spent(response):
            return RefusedRequestError(message, reason)
        return SimpoError(message)

    def _message(self, reason: str, request: Any) -> str:
        attempts = _attempts(request)
        return f"{self._endpoint.label}: {reason}" + (f" ({attempts} attempts)" if attempts > 1 else "")

    def _one_safe_line(self, text: str) -> str:
        """One line without secrets: a server may repeat the key in its error."""
        return self._redact_key(" ".join(text.split()))[:_LONGEST_REASON]  # last, because half a key is not found

    def _redact_key(self, text: str) -> str:
        for form in (str, repr, json.dumps):  # a server's error may hold it in quotes, as it looks in Python or JSON
            if self._key is not None:
                text = text.replace(form(self._key).strip("\"'"), REDACTED)
        return mask_secrets(text)


def _attempts(request: Any) -> int:
    """The number of times a request has been sent, by the header in which openai counts."""
    return 1 + int(request.headers.get("x-stainless-retry-count", 0))


def _quota_spent(response: Any) -> bool:
    return any(sign in response.text for sign in _QUOTA_SPENT)


def _retry_after(response: Any) -> float:
    """Seconds of a Retry-After header, which contains a number or a date; 0 without one."""
    value = response.headers.get("retry-after", "0")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _document(response: Any) -> Any:
    with suppress(SimpoError), third_party("an error's text"):
        return response.json()
    return response.text


def _unsupported(response: Any) -> str | None:
    """The parameter, ``max_tokens`` or ``temperature``, that the server refuses; None for any other error."""
    if response.status_code not in _REFUSED_REQUEST or not _UNSUPPORTED.search(response.text):
        return None
    document = _document(response)
    error = document.get("error") if isinstance(document, dict) else None
    named = error.get("param") if isinstance(error, dict) else None
    for name in ("max_tokens", "temperature"):
        if named == name or (not named and re.search(rf"\b{name}\b", response.text)):
            return name
    return None
