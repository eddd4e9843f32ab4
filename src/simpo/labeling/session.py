"""Labeling sessions: items to judge, judgments in SQLite, the order of items and answers for everybody, progress."""

from __future__ import annotations

import json
import sqlite3
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import median
from threading import Lock
from typing import Any, Literal, get_args

from simpo.data.messages import Message, context_of
from simpo.errors import SimpoError, third_party
from simpo.evaluation.answers import read_answer_file
from simpo.evaluation.compare import all_pairs, read_matched
from simpo.runs.files import read_lines
from simpo.runs.log import utc_now

# ---- Items to judge: a prompt with two answers to compare, or several to rank, from files of answers.


@dataclass(frozen=True)
class Item:
    """One thing to judge."""

    id: str  # of the pair, as `simpo compare` and `simpo pair` name pairs, or of the prompt
    prompt: str | list[Message]  # text or messages
    # Two or more answers, in the order of the file; never in the order in which they are shown.
    responses: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # tools and template variables that belong to the prompt

    @property
    def is_tie(self) -> bool:
        """Whether both answers are the same text, about which nobody needs to be asked."""
        return len(set(self.responses)) == 1

    def row(self) -> dict[str, Any]:
        """The item as a row of a file."""
        return {"id": self.id, "prompt": self.prompt, **self.columns, "responses": list(self.responses)}


def load_items(path: Path) -> list[Item]:
    """The items whose rows are in a file."""
    return [
        Item(row["id"], row["prompt"], tuple(row["responses"]), context_of(row).columns) for row in read_lines(path)
    ]


_MOST = 9  # answers to rank; there are nine number keys


def items_of_two(a: Path, b: Path) -> tuple[list[Item], Counter[str]]:
    """Every answer in file ``a`` against every answer in ``b`` to the same prompt, as ``simpo compare`` pairs them.

    Returns the items, including those that are ties, and the number of those.
    """
    pairs, _ = all_pairs(read_matched(a, b))
    items = [Item(pair.id, pair.prompt, (pair.a, pair.b), pair.context.columns) for pair in pairs]
    ties = sum(item.is_tie for item in items)
    if ties == len(items):
        raise SimpoError(f"{a} and {b}: all answers are identical; there is nothing to judge")
    return items, Counter({"pairs_of_identical_answers": ties} if ties else {})


def items_of_one(path: Path, *, pairs: bool) -> tuple[list[Item], Counter[str]]:
    """The different answers to every prompt of a file, to be compared or ranked.

    ``pairs`` asks about every two answers instead of a ranking. Returns the items, and how many answers and prompts are
    left out, by reason.
    """
    records = read_answer_file(path)
    items: list[Item] = []
    dropped: Counter[str] = Counter()
    for key, record in records.items():
        responses = list(dict.fromkeys(record["responses"]))
        dropped["answers_the_same_as_another_one"] += len(record["responses"]) - len(responses)
        dropped["prompts_fewer_than_two_different_answers"] += len(responses) < 2
        if len(responses) > _MOST and not pairs:
            raise SimpoError(
                f"{path}: prompt {key}: {len(responses)} answers, and at most {_MOST} can be ranked; compare them in "
                "pairs with --pairs true, or sample fewer"
            )
        groups: dict[str, tuple[str, ...]] = {key: tuple(responses)} if len(responses) > 1 else {}
        if pairs:
            groups = {f"{key}/{i}-{j}": (a, b) for (i, a), (j, b) in combinations(enumerate(responses), 2)}
        columns = context_of(record).columns
        items += [Item(of_group, record["prompt"], group, columns) for of_group, group in groups.items()]
    if not items:
        most = max(len(record["responses"]) for record in records.values())
        what = "one answer to every prompt" if most == 1 else "no prompt with two different answers"
        raise SimpoError(f"{path}: {what}; sample several with --n 2, or name a second file with --against")
    return items, +dropped


# ---- Judgments in SQLite: every action of a labeler is a row that is never changed.

Kind = Literal["ranked", "tie", "both_bad", "skip"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SCHEMA = Path(__file__).with_name("judgments.sql")
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
    """The database of a labeling run, for one thread at a time; other processes may read it."""

    def __init__(self, path: Path) -> None:
        """Open or create it."""
        self._path = path
        with self._reported():
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = full")  # a judgment that was confirmed survives a power cut
            self._connection.executescript(_SCHEMA.read_text(encoding="utf-8"))

    def add(self, key: str, judgment: Judgment) -> None:
        """Store a judgment; a second one with the same key is the same request, sent again."""
        lists = {"ranks": json.dumps(judgment.ranks), "shown": json.dumps(judgment.shown)}
        self._execute(
            "insert or ignore into events (key, time, labeler, item, kind, ranks, shown, note, seconds) "
            "values (:key, :time, :labeler, :item, :kind, :ranks, :shown, :note, :seconds)",
            {"key": key, "time": utc_now(), **asdict(judgment), **lists},
        )

    def undo(self, key: str, labeler: str, item: str) -> None:
        """Withdraw a labeler's judgment of an item."""
        self._execute(
            "insert or ignore into events (key, time, labeler, item, kind) values (?, ?, ?, ?, 'undo')",
            (key, utc_now(), labeler, item),
        )

    def item_of(self, key: str) -> str | None:
        """The item of the event with this key; None if there is none."""
        found = self._execute("select item from events where key = ?", (key,))
        return str(found[0][0]) if found else None

    def judgments(self) -> list[Judgment]:
        """All judgments that were not withdrawn or replaced, in the order in which they were made."""
        return [
            Judgment(labeler, item, kind, tuple(json.loads(ranks)), tuple(json.loads(shown)), note, seconds)
            for labeler, item, kind, ranks, shown, note, seconds in self._execute(_CURRENT)
        ]

    def show(self, labeler: str, item: str | None) -> None:
        """Remember what a labeler's page shows now, or that it shows nothing."""
        self._execute("delete from screens where labeler = ?", (labeler,))
        if item is not None:
            self._execute("insert into screens (labeler, item, since) values (?, ?, ?)", (labeler, item, time.time()))

    def on_screen(self, seconds: float) -> dict[str, str]:
        """The item that each labeler's page has shown for at most so many seconds."""
        return dict(self._execute("select labeler, item from screens where since >= ?", (time.time() - seconds,)))

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _execute(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """The rows of a statement."""
        with self._reported():
            return self._connection.execute(statement, values).fetchall()

    def _reported(self) -> AbstractContextManager[None]:
        return third_party(f"{self._path}: the judgments cannot be read or written")


# ---- The session: who is shown what, and how far everybody has come.

_RECENT = 20  # judgments whose median is the pace
_HELD = 1800.0  # seconds for which nobody else is shown an item that a labeler has on the screen
_LONGEST_NAME, _LONGEST_NOTE = 60, 10_000  # characters


class Session:
    """The items and their labelers while the page is open; the store holds everything that happens.

    Some items are judged by every labeler, so that their agreement can be measured; every other item is judged by
    whoever comes first, and nobody else is shown it while somebody has had it on the screen for less than half an hour.
    """

    def __init__(self, items: Sequence[Item], store: Store, *, seed: int, overlap: float) -> None:
        """Start or continue; ``overlap`` is the share of the items that every labeler judges.

        ``seed`` determines the shared items, and each labeler's order of items and of answers.
        """
        self._items = {item.id: item for item in items}
        self._store, self._seed, self._lock = store, seed, Lock()
        self._shared = set(_shuffled(self._items, f"{seed} shared")[: round(overlap * len(items))])

    def next(self, labeler: str) -> dict[str, Any]:
        """The next state of a labeler's page: ``item``, None if nothing is left, and ``progress``."""
        with self._lock:
            return self._page(labeler)

    def judge(self, vote: Judgment, key: str) -> dict[str, Any]:
        """Store a vote, whose ranks are in the order in which the answers were shown, and return as :meth:`next` does.

        ``key`` identifies the request: one that is sent again stores nothing.
        """
        if vote.item not in self._items:
            raise SimpoError(f"item {vote.item!r} is not one of this run's")
        shown, levels = self._shown(vote.labeler, self._items[vote.item]), sorted(set(vote.ranks))
        if levels != list(range(1, len(levels) + 1)) or len(vote.ranks) != len(shown):
            raise SimpoError(f"ranks: expected one for each of {len(shown)} answers, from 1, without gaps")
        if (vote.kind == "ranked") != (len(levels) > 1):
            raise SimpoError(f"ranks: {list(vote.ranks)} do not fit {vote.kind}")
        ranks = tuple(rank for _, rank in sorted(zip(shown, vote.ranks, strict=True)))
        with self._lock:
            self._store.add(key, replace(vote, ranks=ranks, shown=shown))
            return self._page(vote.labeler)

    def undo(self, key: str, labeler: str) -> dict[str, Any]:
        """Withdraw a labeler's last judgment, and show its item again; without one, as :meth:`next`."""
        with self._lock:
            item, note = self._store.item_of(key), ""
            own = [one for one in self._store.judgments() if one.labeler == labeler]
            if item is None and own:
                item, note = own[-1].item, own[-1].note
                self._store.undo(key, labeler, item)
            return self._page(labeler, item) | {"note": note}

    def _page(self, labeler: str, again: str | None = None) -> dict[str, Any]:
        """The data for a labeler's page: the item to judge ``again``, or the first open one."""
        judgments = self._store.judgments()
        left = self._open(labeler, judgments)
        shown = again or next(iter(left), None)
        self._store.show(labeler, shown)  # stored, so that it holds after a restart, too
        own = [one for one in judgments if one.labeler == labeler]
        progress = {
            "done": len(own),
            "left": len(left),
            "pace": median(one.seconds for one in own[-_RECENT:]) if own else None,
            "judged_items": len({one.item for one in judgments if one.kind != "skip"}),
            "items": len(self._items),
            "labelers": len({one.labeler for one in judgments} | {labeler}),
        }
        return {"item": None if shown is None else self._content(labeler, self._items[shown]), "progress": progress}

    def _open(self, labeler: str, judgments: Sequence[Judgment]) -> list[str]:
        """The items that this labeler may judge and has not judged, in their order."""
        own = {one.item for one in judgments if one.labeler == labeler}
        taken = {one.item for one in judgments if one.labeler != labeler and one.kind != "skip"}
        taken |= {item for name, item in self._store.on_screen(_HELD).items() if name != labeler}
        order = _shuffled(self._items, f"{self._seed} items {labeler}")
        return [item for item in order if item not in own and (item in self._shared or item not in taken)]

    def _shown(self, labeler: str, item: Item) -> tuple[int, ...]:
        """The answers' places in the file, in the order in which this labeler sees them."""
        return tuple(_shuffled(range(len(item.responses)), f"{self._seed} answers {labeler} {item.id}"))

    def _content(self, labeler: str, item: Item) -> dict[str, Any]:
        prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        return {
            "id": item.id,
            "prompt": [{"role": str(one["role"]), "content": str(one.get("content") or "")} for one in prompt],
            "tools": item.columns.get("tools"),
            "answers": [item.responses[place] for place in self._shown(labeler, item)],
        }


def _shuffled(values: Iterable[Any], seed: str) -> list[Any]:
    found = list(values)
    return Random(seed).sample(found, len(found))  # noqa: S311 - an order, not secrets


# ---- Requests of the page.


def read_labeler(body: Mapping[str, Any]) -> str:
    """The labeler's name in a request, composed (NFC) and with single spaces: the same name however it was typed."""
    name = body.get("labeler")
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise SimpoError(f"labeler: give a name of at most {_LONGEST_NAME} characters")
    return " ".join(unicodedata.normalize("NFC", name).split())


def read_key(body: Mapping[str, Any]) -> str:
    """The identity of a request."""
    key = body.get("key")
    if not isinstance(key, str) or not 8 <= len(key) <= 64:
        raise SimpoError("key: expected a text of 8 to 64 characters")
    return key


def read_vote(body: Mapping[str, Any]) -> Judgment:
    """The vote in a request. The session knows in which order its answers were shown, so ``shown`` is empty here."""
    item, kind, ranks, seconds = (body.get(key) for key in ("item", "kind", "ranks", "seconds"))
    note = body.get("note", "")
    if not isinstance(item, str):
        raise SimpoError("item: expected the id of an item")
    if kind not in KINDS:
        raise SimpoError(f"kind: expected one of {', '.join(KINDS)}")
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
        raise SimpoError("ranks: expected a list of whole numbers")
    if not isinstance(note, str) or len(note) > _LONGEST_NOTE:
        raise SimpoError(f"note: expected at most {_LONGEST_NOTE:,} characters")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e7:
        raise SimpoError("seconds: expected a number of seconds")
    return Judgment(read_labeler(body), item, kind, tuple(ranks), (), note.strip(), float(seconds))
