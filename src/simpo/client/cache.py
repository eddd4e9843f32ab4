"""Replies on disk, keyed by their requests: a request that was answered once is not sent again."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from simpo.client.chat import ChatReply
from simpo.errors import SimpoError, third_party
from simpo.runs.atomic import disk_errors

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


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
        """Store a reply and return once it is on disk.

        Returns:
            The stored reply: an earlier one if another process received one in the meantime.
        """
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
