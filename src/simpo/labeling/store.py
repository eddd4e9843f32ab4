"""Judgments in SQLite: every action of a labeler is a row that is never changed."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

from simpo.errors import SimpoError
from simpo.runs.log import utc_now

Kind = Literal["ranked", "tie", "both_bad", "skip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_UNDO = "undo"

_SCHEMA = """
create table if not exists events (
    number integer primary key autoincrement,
    key text not null unique,   -- made by the page, so that a request that is repeated counts once
    time text not null,         -- UTC
    labeler text not null,
    item text not null,
    kind text not null,         -- ranked, tie, both_bad, skip, undo
    ranks text,                 -- JSON: the rank of every answer in the order of the file, 1 for the best
    shown text,                 -- JSON: the answers' places in the file, in the order in which they were shown
    note text,
    seconds real                -- for which the item was visible
);
create table if not exists screens (
    labeler text primary key,
    item text not null,         -- what the labeler's page shows
    since real not null         -- Unix time
);
"""
# What counts is the last event of every labeler for every item.
_CURRENT = """
select labeler, item, kind, ranks, shown, note, seconds from events
where number in (select max(number) from events group by labeler, item) and kind != 'undo' order by number
"""


@dataclass(frozen=True)
class Judgment:
    """One labeler's judgment of one item."""

    labeler: str  # who
    item: str  # the item's id
    kind: Kind  # `ranked` if one answer is better than another, `tie` and `both_bad` if none is, `skip` for no judgment
    # Of every answer in the order of the file, 1 for the best, equal for ties; all 1 if none is better.
    ranks: tuple[int, ...]
    shown: tuple[int, ...]  # the answers' places in the file in the order in which they were shown
    note: str  # the labeler's words
    seconds: float  # for which the item was visible


class Store:
    """The database of a labeling run; usable from several threads, and by one process at a time for writing."""

    def __init__(self, path: Path) -> None:
        """Open or create it."""
        self._path = path
        self._lock = Lock()
        with _errors(path):
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = full")  # a judgment that was confirmed survives a power cut
            self._connection.executescript(_SCHEMA)

    def add(self, key: str, judgment: Judgment) -> None:
        """Store a judgment; a second one with the same key is the same request, sent again."""
        ranks, shown = json.dumps(judgment.ranks), json.dumps(judgment.shown)
        values = (judgment.labeler, judgment.item, judgment.kind, ranks, shown, judgment.note, judgment.seconds)
        self._execute(
            "insert or ignore into events (key, time, labeler, item, kind, ranks, shown, note, seconds) "
            "values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, utc_now(), *values),
        )

    def undo(self, key: str, labeler: str, item: str) -> None:
        """Withdraw a labeler's judgment of an item."""
        self._execute(
            "insert or ignore into events (key, time, labeler, item, kind) values (?, ?, ?, ?, ?)",
            (key, utc_now(), labeler, item, _UNDO),
        )

    def item_of(self, key: str) -> str | None:
        """The item of the event with this key; None if there is none."""
        found = self._execute("select item from events where key = ?", (key,))
        return str(found[0][0]) if found else None

    def judgments(self) -> list[Judgment]:
        """All judgments that were not withdrawn or replaced, in the order in which they were made."""
        return list(map(_judgment, self._execute(_CURRENT)))

    def show(self, labeler: str, item: str | None) -> None:
        """Remember what a labeler's page shows now, or that it shows nothing."""
        if item is None:
            self._execute("delete from screens where labeler = ?", (labeler,))
        else:
            values = (labeler, item, time.time())
            self._execute("insert or replace into screens (labeler, item, since) values (?, ?, ?)", values)

    def on_screen(self, seconds: float) -> dict[str, str]:
        """The item that each labeler's page has shown for at most so many seconds."""
        return dict(self._execute("select labeler, item from screens where since >= ?", (time.time() - seconds,)))

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows of a statement."""
        with self._lock, _errors(self._path):
            return self._connection.execute(statement, values).fetchall()


def read_judgments(path: Path) -> list[Judgment]:
    """The judgments in a database, which may be in use."""
    with _errors(path), closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        return list(map(_judgment, connection.execute(_CURRENT)))


def _judgment(row: Sequence[Any]) -> Judgment:
    labeler, item, kind, ranks, shown, note, seconds = row
    return Judgment(labeler, item, kind, tuple(json.loads(ranks)), tuple(json.loads(shown)), note, seconds)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise SimpoError(f"{path}: the judgments cannot be read or written: {error}") from error
