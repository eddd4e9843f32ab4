"""Labeling sessions: the order of items and answers for every labeler, and everybody's progress."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from statistics import median
from threading import Lock
from typing import Any

from simpo.errors import SimpoError
from simpo.labeling.items import Item
from simpo.labeling.store import KINDS, Judgment, Store

_RECENT = 20  # judgments whose median is the pace
_HELD = 1800.0  # seconds for which nobody else is shown an item that a labeler has on the screen
_LONGEST_NAME, _LONGEST_NOTE = 60, 10_000  # characters


class Session:
    """The judgments of all labelers while the page is open.

    Some items are judged by every labeler, so that their agreement can be measured; every other item is judged by
    whoever comes first, and nobody else is shown it while somebody has had it on the screen for less than half an hour.
    """

    def __init__(self, items: Sequence[Item], store: Store, *, seed: int, overlap: float) -> None:
        """Start or continue; ``overlap`` is the share of the items that every labeler judges.

        ``seed`` determines the shared items, and each labeler's order of items and of answers.
        """
        self._items = {item.id: item for item in items}
        self._store = store
        self._seed = seed
        self._lock = Lock()
        self._orders: dict[str, list[str]] = {}
        self._judged = {(one.labeler, one.item): one for one in store.judgments()}
        self._shared = set(_shuffled(list(self._items), f"{seed} shared")[: round(overlap * len(items))])

    def next(self, labeler: str) -> dict[str, Any]:
        """The next state of a labeler's page: ``item``, None if nothing is left, and ``progress``."""
        with self._lock:
            return self._next_page(labeler)

    def judge(self, vote: Judgment, key: str) -> dict[str, Any]:
        """Store a vote, whose ranks are in the order in which the answers were shown, and return as :meth:`next` does.

        ``key`` identifies the request: one that is sent again stores nothing.
        """
        with self._lock:
            item = self._items.get(vote.item)
            if item is None:
                raise SimpoError(f"item {vote.item!r} is not one of this run's")
            shown = self._shown(vote.labeler, item)
            if sorted(set(vote.ranks)) != list(range(1, len(set(vote.ranks)) + 1)) or len(vote.ranks) != len(shown):
                raise SimpoError(f"ranks: expected one for each of {len(shown)} answers, from 1, without gaps")
            if (vote.kind == "ranked") != (len(set(vote.ranks)) > 1):
                raise SimpoError(f"ranks: {list(vote.ranks)} do not fit {vote.kind}")
            ranks = tuple(rank for _, rank in sorted(zip(shown, vote.ranks, strict=True)))
            judgment = replace(vote, ranks=ranks, shown=shown)
            if self._store.item_of(key) is None:
                self._store.add(key, judgment)
                self._judged.pop((vote.labeler, item.id), None)  # the last one made is the last in the order
                self._judged[vote.labeler, item.id] = judgment
            return self._next_page(vote.labeler)

    def undo(self, key: str, labeler: str) -> dict[str, Any]:
        """Withdraw a labeler's last judgment, and show its item again; without one, as :meth:`next`."""
        with self._lock:
            item, before = self._store.item_of(key), None
            if item is None:
                item = next((item for name, item in reversed(self._judged) if name == labeler), None)
                if item is None:
                    return self._next_page(labeler)
                self._store.undo(key, labeler, item)
                before = self._judged.pop((labeler, item))
            found = self._page(labeler, self._items[item])
            return found | {"note": before.note if before else ""}

    def _next_page(self, labeler: str) -> dict[str, Any]:
        return self._page(labeler, next((self._items[item] for item in self._open(labeler)), None))

    def _open(self, labeler: str) -> list[str]:
        """The items that this labeler may judge and has not judged, in their order."""
        if labeler not in self._orders:
            self._orders[labeler] = _shuffled(list(self._items), f"{self._seed} items {labeler}")
        taken = {item for (name, item), one in self._judged.items() if name != labeler and one.kind != "skip"}
        taken |= {item for name, item in self._store.on_screen(_HELD).items() if name != labeler}
        return [
            item
            for item in self._orders[labeler]
            if (labeler, item) not in self._judged and (item in self._shared or item not in taken)
        ]

    def _shown(self, labeler: str, item: Item) -> tuple[int, ...]:
        places = list(range(len(item.responses)))
        return tuple(_shuffled(places, f"{self._seed} answers {labeler} {item.id}"))

    def _page(self, labeler: str, item: Item | None) -> dict[str, Any]:
        self._store.show(labeler, None if item is None else item.id)  # stored, so that it holds after a restart, too
        return {"item": item and self._content(labeler, item), "progress": self._progress(labeler)}

    def _content(self, labeler: str, item: Item) -> dict[str, Any]:
        prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        return {
            "id": item.id,
            "prompt": [{"role": str(one["role"]), "content": str(one.get("content") or "")} for one in prompt],
            "tools": item.columns.get("tools"),
            "answers": [item.responses[place] for place in self._shown(labeler, item)],
        }

    def _progress(self, labeler: str) -> dict[str, Any]:
        own = [one for (name, _), one in self._judged.items() if name == labeler]
        judged = [one for one in self._judged.values() if one.kind != "skip"]
        return {
            "done": len(own),
            "left": len(self._open(labeler)),
            "pace": median(one.seconds for one in own[-_RECENT:]) if own else None,
            "judged_items": len({one.item for one in judged}),
            "items": len(self._items),
            "labelers": len({one.labeler for one in self._judged.values()} | {labeler}),
        }


def _shuffled(values: list[Any], seed: str) -> list[Any]:
    return Random(seed).sample(values, len(values))  # noqa: S311 - an order, not secrets


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
    item, kind, ranks = body.get("item"), body.get("kind"), body.get("ranks")
    note, seconds = body.get("note", ""), body.get("seconds")
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
