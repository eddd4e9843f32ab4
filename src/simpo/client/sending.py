"""One request to a server, sent until it is answered or there is no hope."""

from __future__ import annotations

import asyncio
import json
import random
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from simpo.client.chat import ChatReply, ChatRequest, error_text, read_reply
from simpo.client.endpoint import Endpoint
from simpo.errors import SimpoError
from simpo.runs.redaction import REDACTED, masked

# Seconds: before the second attempt, doubled before each further one up to the longest, and in all for one request.
_FIRST_WAIT, _LONGEST_WAIT, _PATIENCE = 1.0, 30.0, 300.0
_HOPEFUL = (408, 425, 429)  # and everything from 500 on
_OF_THE_REQUEST = (400, 413, 422)  # too long, filtered, not understood; 401, 403 and 404 would be those of all others
# Said with a status that says something else: no wait helps, and no other request would be answered.
_SPENT = ("insufficient_quota", "billing_hard_limit_reached", "credit balance is too low")
_LONGEST_REASON = 300  # characters
# How servers say that a parameter, or its value, is not among those that a model takes.
_UNSUPPORTED = re.compile(
    r"unsupported|(?:not|n't)\W+support|not permitted|not allowed|unrecognized|unexpected|deprecated|extra_forbidden"
    r"|only\W.{0,40}\b(?:allowed|supported|accepted)",
    re.IGNORECASE,
)
_ADAPTABLE = ("max_tokens", "temperature")


class RefusedRequestError(SimpoError):
    """The server answers others, but not this request.

    Attributes:
        reason: the status and what the server said.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Fault(Exception):  # noqa: N818 - most faults are mended by another attempt
    """An attempt failed.

    Attributes:
        hopeful: whether another one may succeed.
        wait: seconds that the server asks for before it.
        of_the_request: whether it is because of what the request holds.
        parameter: the one of :data:`_ADAPTABLE` that the server does not take.
    """

    def __init__(
        self,
        reason: str,
        *,
        hopeful: bool = True,
        wait: float = 0.0,
        of_the_request: bool = False,
        parameter: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.parameter = parameter
        self.hopeful = hopeful
        self.wait = wait
        self.of_the_request = of_the_request


def connections(endpoint: Endpoint) -> httpx.AsyncClient:
    """A connection pool to a server, through the proxy that the environment names if it is not on this machine.

    Raises:
        SimpoError: the environment's proxy or certificates cannot be used.
    """
    # The time is limited for each attempt as a whole.
    limits = httpx.Limits(max_connections=endpoint.concurrency)
    try:
        return httpx.AsyncClient(timeout=None, limits=limits, trust_env=not endpoint.local)  # noqa: S113
    except (ValueError, ImportError, OSError) as error:
        raise SimpoError(
            f"{endpoint.url}: the environment's proxy or certificates (*_PROXY, SSL_CERT_*) cannot be used: {error}"
        ) from error


@dataclass
class Dialect:
    """How a model on a server wants to be asked, as its refusals have shown.

    Newer models of OpenAI take ``max_completion_tokens`` instead of ``max_tokens``, and no temperature but their own.

    Attributes:
        exact_temperature: never leave out a temperature other than 1, which is the interface's default.
        refused: parameters that it has refused.
    """

    exact_temperature: bool = False
    refused: frozenset[str] = frozenset()

    def spoken(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a request as the server takes it."""
        body = dict(body)
        if "max_tokens" in self.refused and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if "temperature" in self.refused and not (self.exact_temperature and body.get("temperature") != 1):
            body.pop("temperature", None)
        return body

    def learn(self, parameter: str | None, body: dict[str, Any]) -> bool:
        """Note that the server refused a parameter of ``body``; whether it can now be asked in another way."""
        self.refused |= {parameter} if parameter else set()
        return parameter in body and self.spoken(body) != body


class Sender:
    """Sends requests over one connection pool.

    Attributes:
        repeated: attempts that failed and were made again.
    """

    def __init__(self, http: httpx.AsyncClient, endpoint: Endpoint, dialect: Dialect) -> None:
        """Look the key up.

        Raises:
            SimpoError: there is none, and the server needs one.
        """
        self._http, self._endpoint, self._key = http, endpoint, endpoint.api_key()
        self._dialect = dialect
        self._quiet_until = 0.0  # by the clock of the event loop: the server asked all of us to wait
        self.repeated = 0

    async def send(self, request: ChatRequest) -> ChatReply:
        """Send until there is a reply.

        Waits twice as long after every failed attempt, or as long as the server asks for, with some chance in it so
        that waiting requests do not come back all at once.

        Raises:
            RefusedRequestError: the server will not answer this request (status 400, 413 or 422).
            SimpoError: no reply within the endpoint's attempts, or a refusal that another attempt would not change.
        """
        waited = 0.0
        for attempt in range(1, self._endpoint.attempts + 1):
            await asyncio.sleep(self._quiet_until - asyncio.get_running_loop().time())
            try:
                return await self._adapted(request)
            except _Fault as fault:
                pause = max(_backoff(attempt), fault.wait)
                if not fault.hopeful or attempt == self._endpoint.attempts or waited + pause > _PATIENCE:
                    # Not "from" the fault, whose text may hold the key.
                    raise self._given_up(fault, attempt) from None
                self.repeated += 1
                waited += pause
                if fault.wait:
                    self._quiet_until = asyncio.get_running_loop().time() + pause
                await asyncio.sleep(pause)
        raise AssertionError("at least one attempt is made")

    async def _adapted(self, request: ChatRequest) -> ChatReply:
        """Send in the words that the server takes, which a refusal may teach."""
        while True:
            body = self._dialect.spoken(request.body(self._endpoint.model))
            try:
                reply = await self._attempt(json.dumps(body).encode())
            except _Fault as fault:
                if not self._dialect.learn(fault.parameter, body):
                    raise
                self.repeated += 1
            else:
                return replace(reply, default_temperature=request.temperature != 1 and "temperature" not in body)

    async def _attempt(self, body: bytes) -> ChatReply:
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers |= self._endpoint.authorization(self._key)
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                response = await self._http.post(self._endpoint.url, content=body, headers=headers)
        except TimeoutError as error:
            raise _Fault(f"no answer within {self._endpoint.timeout:g} s") from error
        except httpx.RequestError as error:
            raise _Fault(str(error) or type(error).__name__) from error
        if response.status_code != 200:
            raise _refusal(response)
        try:
            return read_reply(response.content)
        except (ValueError, RecursionError) as error:
            raise _Fault(f"an unreadable answer: {error}") from error

    def _given_up(self, fault: _Fault, attempts: int) -> SimpoError:
        reason = masked(" ".join(str(fault).split()))
        if self._key is not None:  # which a server may repeat in its error
            reason = reason.replace(self._key, REDACTED)
        reason = reason[:_LONGEST_REASON]  # not before, because half a key would not be found
        tries = f" ({attempts} attempts)" if attempts > 1 else ""
        asked = f"; it asks to wait {fault.wait:,.0f} s" if fault.wait > _PATIENCE else ""
        if fault.parameter == "temperature" and self._dialect.exact_temperature:
            asked += "; it samples at its own temperature only: ask for --temperature 1"
        message = f"{self._endpoint.place}: {reason}{tries}{asked}"
        return RefusedRequestError(message, reason) if fault.of_the_request else SimpoError(message)


def _backoff(attempt: int) -> float:
    """Seconds after the failure of an attempt, the first being 1."""
    longest = min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT)
    return longest * (0.5 + 0.5 * random.random())  # noqa: S311 - spreads requests, guards nothing


def _refusal(response: httpx.Response) -> _Fault:
    status = response.status_code
    document = _json(response)
    said = error_text(document) or response.reason_phrase
    spent = any(sign in response.text for sign in _SPENT)
    return _Fault(
        f"status {status}: {said}",
        hopeful=(status in _HOPEFUL or status >= 500) and not spent,
        wait=_retry_after(response),
        of_the_request=status in _OF_THE_REQUEST and not spent,
        parameter=_unsupported(document, response.text) if status in _OF_THE_REQUEST else None,
    )


def _unsupported(document: Any, text: str) -> str | None:
    """The parameter of :data:`_ADAPTABLE` that a refusal is about."""
    error = document.get("error") if isinstance(document, dict) else None
    named = error.get("param") if isinstance(error, dict) else None
    if not _UNSUPPORTED.search(text):
        return None
    return next((name for name in _ADAPTABLE if named == name or (not named and re.search(rf"\b{name}\b", text))), None)


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text


def _retry_after(response: httpx.Response) -> float:
    """Seconds of a Retry-After header, which has a number or a date; 0 without one."""
    value = response.headers.get("retry-after", "0")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return 0.0
