"""ChatClient: many requests to one model, several at a time, with every reply in a cache."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.client.cache import ReplyCache
from simpo.client.chat import ChatReply, ChatRequest, Endpoint
from simpo.client.cost import Estimate, Usage
from simpo.errors import SimpoError
from simpo.runs.terminal import Advance, progress

if TYPE_CHECKING:
    from simpo.client.sending import Dialect, Sender

logger = logging.getLogger(__name__)

# If the first requests, this many, are all refused, the cause is not the content of one of them.
TRIED = 8

Replies = dict[str, ChatReply]


class ChatClient:
    """Sends requests to one model.

    Attributes:
        endpoint: server and model.
        usage: counts of the requests and their tokens.
    """

    def __init__(self, endpoint: Endpoint, cache: Path | None, *, exact_temperature: bool = False) -> None:
        """Open the cache; nothing is sent yet.

        Args:
            endpoint: server and model.
            cache: folder with replies, which several processes may share; None for no cache.
            exact_temperature: fail if the server refuses the temperature, instead of using the server's own.

        Raises:
            SimpoError: the cache cannot be read or written.
        """
        self.endpoint = endpoint
        self.usage = Usage()
        self._cache = None if cache is None else ReplyCache(cache, endpoint.model)
        self._exact_temperature = exact_temperature
        self._dialect: Dialect | None = None  # the accepted parameters are learned once, for all calls
        self._got_replies = False  # whether the server has answered any request, now or in an earlier run

    def estimate(self, requests: Sequence[ChatRequest]) -> Estimate:
        """The requests that :meth:`complete` would send; a repeated request is sent once."""
        wanted = self._by_key(requests)
        missing = [request for key, request in wanted.items() if self._cached(key) is None]
        self._got_replies = self._got_replies or len(missing) < len(wanted)
        return Estimate.of(missing, len(wanted) - len(missing))

    def complete(
        self,
        requests: Sequence[ChatRequest],
        *,
        despite_refusals: bool = False,
        log: Callable[[str], None] | None = None,
    ) -> list[ChatReply]:
        """The replies, in the order of the requests.

        Each reply is on disk as soon as it is received, so that the same call, after a failure or a kill, sends only
        what is missing.

        Args:
            requests: the requests; a repeated one is sent once.
            despite_refusals: continue after a request that the server refuses because of its content (status 400, 413
                or 422): its reply has no text and the reason in ``refused``; it is counted in ``usage`` and not cached.
            log: receives lines of progress.

        Raises:
            SimpoError: a request was refused or not answered after all attempts (those in progress are finished, no
                others are sent), there is no key, or a reply cannot be stored. With ``despite_refusals`` also if the
                first :data:`TRIED` requests, or all if there are fewer, were refused and none was ever answered.
        """
        wanted = self._by_key(requests)
        replies = {key: reply for key in wanted if (reply := self._cached(key)) is not None}
        self.usage.cached += len(replies)
        self._got_replies = self._got_replies or bool(replies)
        missing = {key: request for key, request in wanted.items() if key not in replies}
        if missing:
            with progress("replies", len(wanted), len(replies), log or logger.info) as advance:
                replies |= _run(self._send_all(missing, despite_refusals, advance))
            self._got_replies = True
        for key, request in wanted.items():
            self.usage.note(request, replies[key])
        return [replies[request.key(self.endpoint.model)] for request in requests]

    def _by_key(self, requests: Sequence[ChatRequest]) -> dict[str, ChatRequest]:
        return {request.key(self.endpoint.model): request for request in requests}

    def _cached(self, key: str) -> ChatReply | None:
        return None if self._cache is None else self._cache.get(key)

    async def _send_all(self, missing: Mapping[str, ChatRequest], despite_refusals: bool, advance: Advance) -> Replies:
        from simpo.client.sending import Dialect, Sender  # noqa: PLC0415 - importing openai takes most of a second

        if self._dialect is None:
            self._dialect = Dialect(self._exact_temperature)
        replies: Replies = {}
        failures: list[SimpoError] = []
        first = list(missing)[:TRIED]
        waiting = iter(missing.items())
        async with Sender(self.endpoint, self._dialect) as sender:

            async def work() -> None:
                for key, request in waiting:
                    try:
                        replies[key] = await self._answer(sender, key, request, despite_refusals)
                        early = [replies[key] for key in first if key in replies]
                        refused = len(early) == len(first) and all(reply.refused for reply in early)
                        if refused and not self._got_replies:
                            reason = early[0].refused
                            raise SimpoError(f"{self.endpoint.label}: the server refuses every request: {reason}")
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
            kept = "" if self._cache is None else "; what was received is kept, and the same command continues"
            raise SimpoError(f"{failures[0]}{kept}") from failures[0]
        return replies

    async def _answer(self, sender: Sender, key: str, request: ChatRequest, despite_refusals: bool) -> ChatReply:
        from simpo.client.sending import RefusedRequestError  # noqa: PLC0415 - as above

        if (reply := self._cached(key)) is not None:  # another process has received it in the meantime
            self.usage.cached += 1
            return reply
        try:
            reply = await sender.send(request)
        except RefusedRequestError as error:
            if not despite_refusals:
                raise
            reply = ChatReply("", refused=error.reason)
        self.usage.add(reply)
        return reply if self._cache is None or reply.refused else self._cache.put(key, reply)


def _run(work: Coroutine[Any, Any, Replies]) -> Replies:
    """Run to the end, also inside a running event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
