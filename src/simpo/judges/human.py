"""Verdicts that people gave, from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpo.data.rows import Row, rows_of
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.judges.protocol import Pair
from simpo.results import fingerprint

_VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


class HumanJudge:
    """Looks verdicts up: rows ``{id, winner}``, whose winner is ``a``, ``b`` or ``tie``."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            SimpoError: it cannot be read, a row is no verdict, or an id occurs twice.
        """
        self._path = path
        rows = load_rows(str(path), split="train")
        self._verdicts: dict[str, float] = {}
        for row, where in rows_of(rows[:], range(len(rows)), path.name):
            key, verdict = _verdict(row, where)
            if key in self._verdicts:
                raise SimpoError(f"{where}: id {key!r} occurs twice; give one verdict each")
            self._verdicts[key] = verdict

    @property
    def identity(self) -> dict[str, Any]:
        """A digest of the verdicts."""
        return {"judge": "human", "verdicts": fingerprint(self._verdicts)}

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The verdicts; None for a pair that nobody judged.

        Raises:
            SimpoError: nobody judged any.
        """
        found = [self._verdicts.get(pair.id) for pair in pairs]
        if all(verdict is None for verdict in found):
            example = pairs[0].id if pairs else "none"
            raise SimpoError(f"{self._path}: none of its ids is that of a pair; the pairs' look like {example!r}")
        return found


def _verdict(row: Row, where: str) -> tuple[str, float]:
    key, winner = row.get("id"), row.get("winner")
    if not isinstance(key, str):
        raise SimpoError(f"{where}: no id; a verdict is {{id, winner}}")
    if not isinstance(winner, str) or winner not in _VERDICTS:
        raise SimpoError(f"{where}: winner: expected a, b or tie, got {winner!r}")
    return key, _VERDICTS[winner]
