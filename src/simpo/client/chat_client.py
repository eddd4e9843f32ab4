"""ChatClient: many requests at once, every reply kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simpo.client.cache import ReplyCache
from simpo.client.chat import ChatReply, ChatRequest
from simpo.client.cost import Estimate, Usage
from simpo.client.endpoint import Endpoint
from simpo.client.sending import Dialect, RefusedRequestError, Sender, connections
from simpo.errors import SimpoError
from simpo.progress import Advance, progress

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
        say: Callable[[str], None] | None = None,
    ) -> list[ChatReply]:
        """The replies, in the order of the requests.

        Each is on the disk as soon as it has been received, so that the same call, after a failure or a kill, sends
        what is missing.

        Args:
            requests: what is asked; one that occurs twice is sent once.
            despite_refusals: go on after a request that the server refuses because of what it holds (status 400, 413 or
                422): its reply has no text and says why in ``refused``; it is counted in ``usage`` and not kept.
            say: gets lines of progress.

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
            with progress("replies", len(wanted), len(replies), say or logger.info) as advance:
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
