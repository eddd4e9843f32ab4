"""What the benchmark has measured once: difficulties and gamed baselines, from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simpo.data.formats import is_number
from simpo.data.rows import Row
from simpo.errors import SimpoError
from simpo.evaluation.alpaca_eval.files import REPOSITORY
from simpo.evaluation.alpaca_eval.length_control import Baselines
from simpo.evaluation.rows import file_digest, hub_file, read_rows

_GAMED_FILE = "df_gamed.csv"


@dataclass(frozen=True)
class LengthControl:
    """Where the difficulties and the gamed baselines come from; None is the hub."""

    gamed: str | None = None
    difficulty: str | None = None

    def read(self, count: int, say: Callable[[str], None]) -> Baselines | None:
        """What the length-controlled win rate needs; None, and a line that says so, where the hub has to give it and
        cannot.

        Args:
            count: of the instructions.
            say: gets that line, and one where there are difficulties of more instructions.

        Raises:
            SimpoError: a file that was given cannot be used, or has difficulties of fewer instructions.
        """
        try:
            found = read_baselines(self.gamed, self.difficulty)
        except SimpoError as error:
            if self.gamed is not None:
                raise
            say(f"note: no length-controlled win rate: {error}; --annotations computes it later")
            return None
        if count > len(found.difficulties):
            raise SimpoError(
                f"{count} instructions, but difficulties of {len(found.difficulties)}: give the benchmark's"
            )
        if count < len(found.difficulties):
            say(
                f"note: difficulties of {len(found.difficulties)} instructions are looked up by position: the "
                f"length-controlled win rate is right only if the {count} are the benchmark's first, in its order"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """What determines the correction of given preferences; the hub's files are None."""
        return {
            name: None if path is None else file_digest(path)
            for name, path in (("gamed", self.gamed), ("difficulty", self.difficulty))
        }


def read_baselines(gamed: str | Path | None, difficulty: str | Path | None) -> Baselines:
    """The gamed baselines and the difficulties, from the hub where they are not given.

    The gamed file's columns are ``index``, ``std_delta_len``, ``instruction_difficulty`` and a preference in [0, 1],
    whose name starts with ``preference``. It has the difficulties too, which a file of ``index`` and
    ``instruction_difficulty`` may replace.

    Raises:
        SimpoError: a file cannot be read, or lacks a column.
    """
    path = hub_file(REPOSITORY, _GAMED_FILE, "--gamed") if gamed is None else gamed
    rows = read_rows(path)
    numbers = [
        [_number(row, key, where) for key in ("std_delta_len", "instruction_difficulty", "preference")]
        for row, where in rows
    ]
    length, difficulties, y = np.array(numbers).T
    if not ((y >= 0) & (y <= 1)).all():
        raise SimpoError(f"{rows[int(((y < 0) | (y > 1)).argmax())][1]}: preference: expected a number from 0 to 1")
    own = rows if difficulty is None else read_rows(difficulty)
    return Baselines(_by_index(own), np.column_stack([np.tanh(length), difficulties, np.zeros(len(y))]), y)


def _by_index(rows: Sequence[tuple[Row, str]]) -> np.ndarray:
    found = {int(_number(row, "index", where)): _number(row, "instruction_difficulty", where) for row, where in rows}
    if sorted(found) != list(range(len(found))):
        raise SimpoError(f"{rows[0][1]}: index: the {len(found)} instructions are not numbered from 0 on")
    return np.array([found[index] for index in range(len(found))])


def _number(row: Row, name: str, where: str) -> float:
    key = next((key for key in row if key == name or (name == "preference" and key.startswith(name))), None)
    if key is None or not is_number(_as_number(row[key])):
        raise SimpoError(f"{where}: no number {name!r}; it has {', '.join(sorted(row))}")
    return float(row[key])


def _as_number(cell: object) -> object:
    """A cell, the number that it holds if it is text: cells of CSV files are."""
    try:
        return float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return None
