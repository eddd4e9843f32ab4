"""Labeling sessions: the items to judge, judgments in SQLite, each labeler's order of items and answers, progress."""

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

# ---- Items to judge, read from files of answers: a prompt with two answers to compare, or several to rank.


@dataclass(frozen=True)
class Item:
    """A prompt with the answers to compare or rank."""

    id: str  # id of the pair, as in `simpo compare` and `simpo pair`, or of the prompt
    prompt: str | list[Message]  # text or messages
    # Two or more answers, always in file order, never in the order in which they are shown.
    responses: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # tools and template variables of the prompt

    @property
    def is_tie(self) -> bool:
        """Whether the answers are identical, so that nobody has to judge them."""
        return len(set(self.responses)) == 1

    def row(self) -> dict[str, Any]:
        """Convert to a JSON row for ``items.jsonl``."""
        return {"id": self.id, "prompt": self.prompt, **self.columns, "responses": list(self.responses)}


def load_items(path: Path) -> list[Item]:
    """Load the items stored in a file."""
    return [
        Item(row["id"], row["prompt"], tuple(row["responses"]), context_of(row).columns) for row in read_lines(path)
    ]


_MOST_RANKED = 9  # answers per prompt, because there are nine number keys


def pair_items(a: Path, b: Path) -> tuple[list[Item], Counter[str]]:
    """Pair every answer in ``a`` with every answer to the same prompt in ``b``, as ``simpo compare`` does.

    Returns the items, including pairs of identical answers, and the number of such pairs.
    """
    pairs, _ = all_pairs(read_matched(a, b))
    items = [Item(pair.id, pair.prompt, (pair.a, pair.b), pair.context.columns) for pair in pairs]
    ties = sum(item.is_tie for item in items)
    if ties == len(items):
        raise SimpoError(f"{a} and {b}: all answers are identical; there is nothing to judge")
    return items, Counter({"pairs_of_identical_answers": ties} if ties else {})


def read_items(path: Path, *, pairs: bool) -> tuple[list[Item], Counter[str]]:
    """Collect the distinct answers to each prompt in a file, to be compared or ranked.

    With ``pairs``, every pair of answers becomes an item; otherwise all answers to a prompt are ranked in one item.
    Returns the items, and how many answers and prompts were left out, by reason.
    """
    records = read_answer_file(path)
    items: list[Item] = []
    dropped: Counter[str] = Counter()
    for key, record in records.items():
        responses = list(dict.fromkeys(record["responses"]))
        dropped["answers_the_same_as_another_one"] += len(record["responses"]) - len(responses)
        dropped["prompts_fewer_than_two_different_answers"] += len(responses) < 2
        if len(responses) > _MOST_RANKED and not pairs:
            raise SimpoError(
                f"{path}: prompt {key}: {len(responses)} answers, but at most {_MOST_RANKED} can be ranked; compare "
                "them in pairs with --pairs true, or sample fewer"
            )
        groups: dict[str, tuple[str, ...]] = {key: tuple(responses)} if len(responses) > 1 else {}
        if pairs:
            groups = {f"{key}/{i}-{j}": (a, b) for (i, a), (j, b) in combinations(enumerate(responses), 2)}
        columns = context_of(record).columns
        items += [Item(item_id, record["prompt"], group, columns) for item_id, group in groups.items()]
    if not items:
        most = max(len(record["responses"]) for record in records.values())
        problem = "only one answer per prompt" if most == 1 else "no prompt has two different answers"
        raise SimpoError(f"{path}: {problem}; sample several with --n 2, or add a second file with --against")
    return items, +dropped


# ---- Judgments in SQLite: an append-only log of what labelers did.

Kind = Literal["ranked", "tie", "both_bad", "skip"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SCHEMA = Path(__file__).with_name("judgments.sql")
# Only the last event per labeler and item counts.
_CURRENT = """
select labeler, item, kind, ranks, shown, note, seconds from events
where number in (select max(number) from events group by labeler, item) and kind != 'undo' order by number
"""


@dataclass(frozen=True)
class Judgment:
    """One labeler's judgment of one item."""

    labeler: str  # the labeler's name
    item: str  # the item's id
    kind: Kind  # `ranked` if some answer is better than another, `tie` or `both_bad` if not, `skip` if not judged
    # One rank per answer in file order: 1 is best, ties share a rank, and all are 1 if no answer is better.
    ranks: tuple[int, ...]
    shown: tuple[int, ...]  # file indices of the answers in the order in which they were shown
    note: str  # the labeler's comment
    seconds: float  # how long the item was visible


class Store:
    """The database of a labeling run. Use it from one thread at a time; other processes may read it."""

    def __init__(self, path: Path) -> None:
        """Open the database, creating it if needed."""
        self._path = path
        with self._errors_reported():
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = full")  # confirmed judgments survive a power failure
            self._connection.executescript(_SCHEMA.read_text(encoding="utf-8"))

    def add(self, key: str, judgment: Judgment) -> None:
        """Store a judgment; a repeated key means the request was sent again, and is ignored."""
        lists = {"ranks": json.dumps(judgment.ranks), "shown": json.dumps(judgment.shown)}
        self._execute(
            "insert or ignore into events (key, time, labeler, item, kind, ranks, shown, note, seconds) "
            "values (:key, :time, :labeler, :item, :kind, :ranks, :shown, :note, :seconds)",
            {"key": key, "time": utc_now(), **asdict(judgment), **lists},
        )

    def undo(self, key: str, labeler: str, item: str) -> None:
        """Withdraw a labeler's judgment of an item; a repeated key is ignored."""
        self._execute(
            "insert or ignore into events (key, time, labeler, item, kind) values (?, ?, ?, ?, 'undo')",
            (key, utc_now(), labeler, item),
        )

    def item_of(self, key: str) -> str | None:
        """Return the item of the event with this key, or None if there is no such event."""
        found = self._execute("select item from events where key = ?", (key,))
        return str(found[0][0]) if found else None

    def judgments(self) -> list[Judgment]:
        """Return all judgments that were not withdrawn or replaced, in the order in which they were made."""
        return [
            Judgment(labeler, item, kind, tuple(json.loads(ranks)), tuple(json.loads(shown)), note, seconds)
            for labeler, item, kind, ranks, shown, note, seconds in self._execute(_CURRENT)
        ]

    def show(self, labeler: str, item: str | None) -> None:
        """Record the item that a labeler's page shows now, or that it shows none."""
        self._execute("delete from screens where labeler = ?", (labeler,))
        if item is not None:
            self._execute("insert into screens (labeler, item, since) values (?, ?, ?)", (labeler, item, time.time()))

    def on_screen(self, seconds: float) -> dict[str, str]:
        """Return the item on each labeler's screen, if it was put there at most this many seconds ago."""
        return dict(self._execute("select labeler, item from screens where since >= ?", (time.time() - seconds,)))

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _execute(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Execute a statement and return its rows."""
        with self._errors_reported():
            return self._connection.execute(statement, values).fetchall()

    def _errors_reported(self) -> AbstractContextManager[None]:
        return third_party(f"{self._path}: the judgments cannot be read or written")


# ---- The session: what each labeler is shown, and everybody's progress.

_PACE_WINDOW = 20  # most recent judgments, whose median time is the pace
_RESERVED_SECONDS = 1800.0  # an item on one labeler's screen is not offered to others for this long
_LONGEST_NAME, _LONGEST_NOTE = 60, 10_000  # characters


class Session:
    """The items and labelers while the page is open; everything that happens goes to the store.

    Some items are judged by every labeler, so that agreement can be measured. Every other item is judged by whoever
    gets to it first, and while it is on somebody's screen, it is not offered to anyone else for half an hour.
    """

    def __init__(self, items: Sequence[Item], store: Store, *, seed: int, overlap: float) -> None:
        """Start or continue a session; ``overlap`` is the share of items judged by every labeler.

        ``seed`` determines which items are shared, and each labeler's order of items and answers.
        """
        self._items = {item.id: item for item in items}
        self._store, self._seed, self._lock = store, seed, Lock()
        self._shared = set(_shuffled(self._items, f"{seed} shared")[: round(overlap * len(items))])

    def next(self, labeler: str) -> dict[str, Any]:
        """Return a labeler's next page: ``item``, or None if nothing is left, and ``progress``."""
        with self._lock:
            return self._page(labeler)

    def judge(self, vote: Judgment, key: str) -> dict[str, Any]:
        """Store a vote and return the labeler's next page, as :meth:`next` does.

        The vote's ranks are in the order in which the answers were shown. ``key`` identifies the request: if it is sent
        again, nothing is stored.
        """
        if vote.item not in self._items:
            raise SimpoError(f"item {vote.item!r} does not belong to this run")
        shown, levels = self._display_order(vote.labeler, self._items[vote.item]), sorted(set(vote.ranks))
        if levels != list(range(1, len(levels) + 1)) or len(vote.ranks) != len(shown):
            raise SimpoError(f"ranks: expected one for each of the {len(shown)} answers, starting at 1, without gaps")
        if (vote.kind == "ranked") != (len(levels) > 1):
            raise SimpoError(f"ranks: {list(vote.ranks)} contradict the kind {vote.kind}")
        ranks = tuple(rank for _, rank in sorted(zip(shown, vote.ranks, strict=True)))
        with self._lock:
            self._store.add(key, replace(vote, ranks=ranks, shown=shown))
            return self._page(vote.labeler)

    def undo(self, key: str, labeler: str) -> dict[str, Any]:
        """Withdraw a labeler's last judgment and show its item again; without one, act like :meth:`next`."""
        with self._lock:
            item, note = self._store.item_of(key), ""
            own = [vote for vote in self._store.judgments() if vote.labeler == labeler]
            if item is None and own:
                item, note = own[-1].item, own[-1].note
                self._store.undo(key, labeler, item)
            return self._page(labeler, item) | {"note": note}

    def _page(self, labeler: str, again: str | None = None) -> dict[str, Any]:
        """Build a labeler's page, with the item to judge ``again`` or, without one, the next remaining item."""
        judgments = self._store.judgments()
        left = self._remaining(labeler, judgments)
        shown = again or next(iter(left), None)
        self._store.show(labeler, shown)  # in the database, so that it survives a restart
        own = [vote for vote in judgments if vote.labeler == labeler]
        progress = {
            "done": len(own),
            "left": len(left),
            "pace": median(vote.seconds for vote in own[-_PACE_WINDOW:]) if own else None,
            "judged_items": len({vote.item for vote in judgments if vote.kind != "skip"}),
            "items": len(self._items),
            "labelers": len({vote.labeler for vote in judgments} | {labeler}),
        }
        return {"item": None if shown is None else self._content(labeler, self._items[shown]), "progress": progress}

    def _remaining(self, labeler: str, judgments: Sequence[Judgment]) -> list[str]:
        """List the items this labeler may judge and has not judged yet, in the labeler's own order."""
        own = {vote.item for vote in judgments if vote.labeler == labeler}
        taken = {vote.item for vote in judgments if vote.labeler != labeler and vote.kind != "skip"}
        taken |= {item for name, item in self._store.on_screen(_RESERVED_SECONDS).items() if name != labeler}
        order = _shuffled(self._items, f"{self._seed} items {labeler}")
        return [item for item in order if item not in own and (item in self._shared or item not in taken)]

    def _display_order(self, labeler: str, item: Item) -> tuple[int, ...]:
        """Return the file indices of the answers in the order in which this labeler sees them."""
        return tuple(_shuffled(range(len(item.responses)), f"{self._seed} answers {labeler} {item.id}"))

    def _content(self, labeler: str, item: Item) -> dict[str, Any]:
        prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        return {
            "id": item.id,
            "prompt": [{"role": str(turn["role"]), "content": str(turn.get("content") or "")} for turn in prompt],
            "tools": item.columns.get("tools"),
            "answers": [item.responses[index] for index in self._display_order(labeler, item)],
        }


def _shuffled(values: Iterable[Any], seed: str) -> list[Any]:
    population = list(values)
    return Random(seed).sample(population, len(population))  # noqa: S311 - for shuffling, not for secrets


# ---- Requests from the page.


def read_labeler(body: Mapping[str, Any]) -> str:
    """Read the labeler's name, normalized to NFC and single spaces, so that variants of a name count as one labeler."""
    name = body.get("labeler")
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise SimpoError(f"labeler: enter a name of at most {_LONGEST_NAME} characters")
    return " ".join(unicodedata.normalize("NFC", name).split())


def read_key(body: Mapping[str, Any]) -> str:
    """Read the unique key of a request."""
    key = body.get("key")
    if not isinstance(key, str) or not 8 <= len(key) <= 64:
        raise SimpoError("key: expected a string of 8 to 64 characters")
    return key


def read_vote(body: Mapping[str, Any]) -> Judgment:
    """Read the vote in a request; ``shown`` stays empty because only the session knows the display order."""
    item, kind, ranks, seconds = (body.get(key) for key in ("item", "kind", "ranks", "seconds"))
    note = body.get("note", "")
    if not isinstance(item, str):
        raise SimpoError("item: expected an item id")
    if kind not in KINDS:
        raise SimpoError(f"kind: expected one of {', '.join(KINDS)}")
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
        raise SimpoError("ranks: expected a list of integers")
    if not isinstance(note, str) or len(note) > _LONGEST_NOTE:
        raise SimpoError(f"note: expected a string of at most {_LONGEST_NOTE:,} characters")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e7:
        raise SimpoError("seconds: expected a number of seconds")
    return Judgment(read_labeler(body), item, kind, tuple(ranks), (), note.strip(), float(seconds))
