"""ChatClient: many requests at once, each retried until it is answered or hopeless, every reply kept."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from simpo.client.cache import ReplyCache
from simpo.client.chat import ChatReply, ChatRequest, Endpoint, error_text, read_reply
from simpo.client.cost import Estimate, Usage
from simpo.errors import SimpoError
from simpo.runs.log import REDACTED, masked
from simpo.runs.terminal import Advance, progress

# ---- One request to a server, sent until it is answered or there is no hope.


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


class _Fault(Exception):  # noqa: N818 - most faults disappear with another attempt
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


logger = logging.getLogger(__name__)


TRIED = 8  # requests; if the first so many are all refused, it is not because of what one of them holds


Replies = dict[str, ChatReply]


class ChatClient:
    """Asks one model.

    Attributes:
        endpoint: where it is.
        usage: what was sent and what it used.
    """

    def __init__(self, endpoint: Endpoint, cache: Path | None, *, exact_temperature: bool = False) -> None:
        """Nothing is sent yet.

        Args:
            endpoint: where the model is.
            cache: folder of replies, which several processes may share; None keeps none.
            exact_temperature: fail where the server refuses the temperature, instead of leaving the choice to it.

        Raises:
            SimpoError: the cache cannot be read or written.
        """
        self.endpoint = endpoint
        self.usage = Usage()
        self._cache = None if cache is None else ReplyCache(cache, endpoint.model)
        self._dialect = Dialect(exact_temperature)
        self._answered = False  # whether any request that it was given has been, now or before

    def estimate(self, requests: Sequence[ChatRequest]) -> Estimate:
        """What :meth:`complete` would send; a request that occurs twice is sent once."""
        wanted = self._by_key(requests)
        missing = [request for key, request in wanted.items() if self._cached(key) is None]
        self._answered = self._answered or len(missing) < len(wanted)
        return Estimate.of(missing, len(wanted) - len(missing))

    def complete(
        self,
        requests: Sequence[ChatRequest],
        *,
        despite_refusals: bool = False,
        log: Callable[[str], None] | None = None,
    ) -> list[ChatReply]:
        """The replies, in the order of the requests.

        Each is on the disk as soon as it has been received, so that the same call, after a failure or a kill, sends
        what is missing.

        Args:
            requests: what is asked; one that occurs twice is sent once.
            despite_refusals: go on after a request that the server refuses because of what it holds (status 400, 413 or
                422): its reply has no text and says why in ``refused``; it is counted in ``usage`` and not kept.
            log: called with lines of progress.

        Raises:
            SimpoError: a request was refused or not answered after all attempts (those that were under way are
                finished, no others are sent), there is no key, or a reply cannot be written. With ``despite_refusals``
                also if the first :data:`TRIED`, or all where there are fewer, were refused, unless an earlier one had
                been answered.
        """
        wanted = self._by_key(requests)
        replies = {key: reply for key in wanted if (reply := self._cached(key)) is not None}
        self.usage.cached += len(replies)
        self._answered = self._answered or bool(replies)
        missing = {key: request for key, request in wanted.items() if key not in replies}
        if missing:
            with progress("replies", len(wanted), len(replies), log or logger.info) as advance:
                replies |= _run(self._send_all(missing, despite_refusals, advance))
            self._answered = True
        for key, request in wanted.items():
            self.usage.note(request, replies[key])
        return [replies[request.key(self.endpoint.model)] for request in requests]

    def _by_key(self, requests: Sequence[ChatRequest]) -> dict[str, ChatRequest]:
        return {request.key(self.endpoint.model): request for request in requests}

    def _cached(self, key: str) -> ChatReply | None:
        return None if self._cache is None else self._cache.get(key)

    async def _send_all(self, missing: Mapping[str, ChatRequest], despite_refusals: bool, advance: Advance) -> Replies:
        replies: Replies = {}
        failures: list[SimpoError] = []
        first = list(missing)[:TRIED]
        waiting = iter(missing.items())
        async with connections(self.endpoint) as http:
            sender = Sender(http, self.endpoint, self._dialect)

            async def work() -> None:
                for key, request in waiting:
                    try:
                        replies[key] = await self._answer(sender, key, request, despite_refusals)
                        self._check_first([replies[key] for key in first if key in replies], len(first))
                    except SimpoError as error:
                        failures.append(error)
                    if failures:
                        return
                    advance(1)

            try:
                await asyncio.gather(*(work() for _ in range(min(self.endpoint.concurrency, len(missing)))))
            finally:
                self.usage.repeated += sender.repeated
        if failures:
            kept = "" if self._cache is None else "; what was received is kept, and the same command goes on from there"
            raise SimpoError(f"{failures[0]}{kept}") from failures[0]
        return replies

    def _check_first(self, replies: Sequence[ChatReply], count: int) -> None:
        """Raise :class:`SimpoError` if so many have come, all of them refusals, and no other reply before."""
        if not self._answered and len(replies) == count and all(reply.refused for reply in replies):
            raise SimpoError(f"{self.endpoint.place}: refuses whatever it is asked: {replies[0].refused}")

    async def _answer(self, sender: Sender, key: str, request: ChatRequest, despite_refusals: bool) -> ChatReply:
        if (reply := self._cached(key)) is not None:  # another process has received it in the meantime
            self.usage.cached += 1
            return reply
        try:
            reply = await sender.send(request)
        except RefusedRequestError as error:
            if not despite_refusals:
                raise
            self.usage.refuse(error.reason)
            return ChatReply("", refused=error.reason)
        self.usage.add(reply)
        return reply if self._cache is None else self._cache.put(key, reply)


def _run(work: Coroutine[Any, Any, Replies]) -> Replies:
    """Run to the end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
