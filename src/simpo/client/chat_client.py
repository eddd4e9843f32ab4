"""ChatClient: many requests to one model, several at a time, with every reply in a cache."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from simpo.client.chat import ChatReply, ChatRequest, Endpoint, Estimate, Usage
from simpo.errors import SimpoError, third_party
from simpo.runs.atomic import disk_errors
from simpo.runs.terminal import Advance, progress

if TYPE_CHECKING:
    from simpo.client.sending import Dialect, Sender

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


# ---- Replies on disk, keyed by their requests: a request that was answered once is not sent again.


def default_cache() -> Path:
    """The user's cache folder, ``~/.cache/simpo/replies`` unless ``XDG_CACHE_HOME`` names another place."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - needs no home
    return Path(home) / "simpo" / "replies"


class ReplyCache:
    """One model's replies in an SQLite database, which several processes may share.

    A damaged database is moved aside, and the replies that can still be read from it are kept. A damaged reply counts
    as missing.

    Attributes:
        path: the database.
    """

    def __init__(self, folder: Path, model: str) -> None:
        """Open the database of ``model``, or create it and its folder."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", model)[-60:].strip("-.")
        self.path = folder / f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.sqlite3"
        self._lock = FileLock(self.path.with_suffix(".lock"))
        self._database: sqlite3.Connection | None = None
        self._unreadable: set[str] = set()
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._use(lambda database: None)

    def get(self, key: str) -> ChatReply | None:
        """The reply to a request, whichever process stored it."""
        query = "SELECT reply FROM replies WHERE key = ?"
        row = self._use(lambda database: database.execute(query, (key,)).fetchone())
        if row is None:
            return None
        reply = _parse(row[0])
        if reply is None and key not in self._unreadable:
            logger.warning("%s: a damaged reply is ignored; its request will be sent again", self.path)
            self._unreadable.add(key)
        return reply

    def put(self, key: str, reply: ChatReply) -> ChatReply:
        """Store a reply; returns it once it is on disk, or an earlier one of another process."""
        self._insert([(key, json.dumps(dataclasses.asdict(reply)).encode())], replace=key in self._unreadable)
        return self.get(key) or reply

    def _insert(self, rows: Sequence[tuple[str, bytes]], *, replace: bool = False) -> None:
        def insert(database: sqlite3.Connection) -> None:
            with database:  # one transaction
                database.executemany(
                    f"INSERT OR {'REPLACE' if replace else 'IGNORE'} INTO replies VALUES (?, ?)",  # noqa: S608
                    rows,
                )

        self._use(insert)

    def _use(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        """Call ``action`` with the open database, a second time with a new one if the first is damaged."""
        try:
            try:
                return action(self._connection())
            except sqlite3.DatabaseError as error:
                name = getattr(error, "sqlite_errorname", "")
                if not name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                    raise
                with self._lock:
                    self._replace_damaged()
                return action(self._connection())
        except sqlite3.Error as error:
            raise SimpoError(f"{self.path}: the cache of replies cannot be used: {error}") from error

    def _connection(self) -> sqlite3.Connection:
        if self._database is None:
            with self._lock:  # SQLite does not wait for another process that changes the journal mode
                database = _connect(self.path)
                self._inode = self.path.stat().st_ino
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = FULL")  # a reply that was paid for survives a power failure
                database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply BLOB NOT NULL)")
                self._database = database
        return self._database

    def _replace_damaged(self) -> None:
        """Move a damaged database aside and copy its readable replies to a new one."""
        if self._database is not None:
            self._database.close()
            self._database = None
        if self.path.stat().st_ino != self._inode:  # another process has replaced it already
            return
        rows: dict[str, bytes] = {}
        query = "SELECT key, reply FROM replies ORDER BY rowid"
        for order in (query, f"{query} DESC"):  # from both ends, up to the damage
            with suppress(sqlite3.DatabaseError):
                rows.update(row for row in _connect(self.path).execute(order) if _parse(row[1]) is not None)
        number = next(n for n in itertools.count(1) if not self.path.with_suffix(f".damaged-{n}").exists())
        aside = self.path.with_suffix(f".damaged-{number}")
        for ending in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                Path(f"{self.path}{ending}").rename(f"{aside}{ending}")
        logger.warning(
            "%s: damaged, and kept as %s; %d replies were recovered, requests for others will be sent again",
            *(self.path, aside.name, len(rows)),
        )
        self._insert([*rows.items()])


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


def _connect(path: Path) -> sqlite3.Connection:
    # Another thread may send the requests, but no two use the connection at once. The timeout is for locks.
    return sqlite3.connect(path, timeout=60.0, check_same_thread=False)


# ---- The client.

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
