"""Concurrent requests to one model, with a cache of its replies on disk."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from simpo.client.chat import ChatReply, ChatRequest, Endpoint, Estimate, Usage
from simpo.errors import SimpoError, third_party
from simpo.runs.files import disk_errors
from simpo.runs.terminal import Advance, progress

if TYPE_CHECKING:
    from simpo.client.sending import Dialect, Sender

logger = logging.getLogger(__name__)

# ---- The cache: a request that has been answered once is never sent again.


def default_cache() -> Path:
    """Return the user's cache folder: ``~/.cache/simpo/replies``, or the same under ``XDG_CACHE_HOME``."""
    # Unlike Path.expanduser, os.path.expanduser does not fail without a home directory.
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(home) / "simpo" / "replies"


class ReplyCache:
    """One model's replies in an SQLite database that several processes can share.

    A damaged reply counts as missing; a damaged database is an error.

    Attributes:
        path: the database file.
    """

    def __init__(self, folder: Path, model: str) -> None:
        """Open the database for ``model`` in ``folder``, creating both if needed."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", model)[-60:].strip("-.")
        self.path = folder / f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.sqlite3"
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            # SQLite's timeout does not cover another process changing the journal mode.
            with FileLock(self.path.with_suffix(".lock")), self._errors():
                # Requests may run in another thread, but only one thread uses the connection at a time.
                self._database = sqlite3.connect(self.path, timeout=60.0, check_same_thread=False)
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = FULL")  # a paid reply must survive a power cut
                self._database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply BLOB NOT NULL)")

    def get(self, key: str) -> ChatReply | None:
        """Return the stored reply to a request, or None; a damaged reply is removed with a warning."""
        with self._errors():
            row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        reply = None if row is None else _parse(row[0])
        if row is not None and reply is None:
            logger.warning("%s: removed a damaged reply; its request will be sent again", self.path)
            self._change("DELETE FROM replies WHERE key = ? AND reply = ?", key, row[0])
        return reply

    def put(self, key: str, reply: ChatReply) -> ChatReply:
        """Store a reply and return it, or the one that another process stored first."""
        content = json.dumps(dataclasses.asdict(reply)).encode()
        self._change("INSERT OR IGNORE INTO replies VALUES (?, ?)", key, content)
        return self.get(key) or reply

    def _change(self, statement: str, *values: str | bytes) -> None:
        with self._errors(), self._database:  # one transaction
            self._database.execute(statement, values)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise SimpoError(
                f"{self.path}: cannot use the reply cache: {error}; if it is damaged, move it away (all requests will "
                "then be sent again)"
            ) from error


def _parse(content: bytes) -> ChatReply | None:
    with suppress(SimpoError), third_party("a stored reply"):
        reply = ChatReply(**json.loads(content))
        logprobs = reply.first_token_logprobs
        texts, counts = (reply.finish_reason, reply.refused), (reply.prompt_tokens, reply.completion_tokens)
        intact = (
            isinstance(reply.text, str)
            and all(isinstance(text, str | None) for text in texts)
            and all(isinstance(count, int | None) for count in counts)
            and (logprobs is None or all(isinstance(value, float | int) for value in logprobs.values()))
        )
        return reply if intact else None
    return None


# ---- The client.

# If all of the first few requests are refused, the problem is not the content of any one of them.
PROBE_REQUESTS = 8

Replies = dict[str, ChatReply]


class ChatClient:
    """Sends requests to one model.

    Attributes:
        endpoint: server and model.
        usage: running totals of requests and tokens.
    """

    def __init__(self, endpoint: Endpoint, cache: Path | None, *, exact_temperature: bool = False) -> None:
        """Open the cache; nothing is sent yet.

        Args:
            endpoint: server and model.
            cache: folder for cached replies, which several processes can share; None for no cache.
            exact_temperature: fail if the server refuses the temperature, rather than fall back to its own.
        """
        self.endpoint = endpoint
        self.usage = Usage()
        self._cache = None if cache is None else ReplyCache(cache, endpoint.model)
        self._exact_temperature = exact_temperature
        self._dialect: Dialect | None = None  # shared by all calls, so that it is learned only once
        self._got_replies = False  # whether the server has ever answered, in this run or an earlier one

    def estimate(self, requests: Sequence[ChatRequest]) -> Estimate:
        """Estimate what :meth:`complete` would send; duplicate requests count once."""
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
        """Send the requests and return the replies in the same order.

        Each reply is stored as soon as it arrives, so after a failure or a kill the same call sends only what is
        missing.

        Args:
            requests: the requests; duplicates are sent once.
            despite_refusals: continue if the server refuses a request because of its content (status 400, 413 or 422):
                its reply has an empty text and the reason in ``refused``; it is counted in ``usage`` and not cached.
            log: receives progress lines.
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
        first = list(missing)[:PROBE_REQUESTS]
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
            hint = "" if self._cache is None else "; replies so far are cached: run the same command to continue"
            raise SimpoError(f"{failures[0]}{hint}") from failures[0]
        return replies

    async def _answer(self, sender: Sender, key: str, request: ChatRequest, despite_refusals: bool) -> ChatReply:
        from simpo.client.sending import RefusedRequestError  # noqa: PLC0415 - as above

        if (reply := self._cached(key)) is not None:  # another process has stored it in the meantime
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
    """Run a coroutine to completion, even inside a running event loop such as a notebook's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
