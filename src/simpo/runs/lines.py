"""JSON Lines files that stay whole when a command is killed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from simpo.errors import SimpoError, third_party
from simpo.runs.atomic import disk_errors, sync, write_text

logger = logging.getLogger(__name__)

_CHECKSUM = "sha256"


class JsonLines:
    """An append-only file of JSON objects, one per line; ``len()`` is their number.

    Opening it drops a last line that a killed process left incomplete, and any other that is damaged; a warning gives
    their number. What they held has to be known from elsewhere or computed again. One process may write at a time.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, *, checked: bool = False) -> None:
        """Open ``path``, or create it and its folder.

        With ``checked`` every line has a checksum, and one that does not match is damaged.
        """
        self.path = Path(path)
        self._checked = checked
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self.path.touch()
            sync(self.path.parent)
            self._ends = _repaired(self.path, _fits if checked else _is_record)  # bytes up to the end of each record

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for line in file:
                record = json.loads(line)
                if self._checked:
                    del record[_CHECKSUM]
                yield record

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records and return when they are on the disk.

        JSON has no NaN and no infinities: such a number is stored as null, so that a run that diverged still has
        its other metrics.

        Raises:
            SimpoError: the disk is full or the file cannot be written; its contents stay as they were.
        """
        lines = [_line(record) for record in records]
        if self._checked:
            lines = [_with_checksum(line) for line in lines]
        with disk_errors(self.path):
            try:
                with self.path.open("ab") as file:
                    file.write(b"".join(lines))
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):  # the first error is the one to report
                    self._truncate()
                raise
        for line in lines:
            self._ends.append(self._end + len(line))

    def keep(self, count: int) -> None:
        """Drop all records after the first ``count``, for a run that resumes from an earlier point."""
        if not 0 <= count <= len(self):
            raise ValueError(f"cannot keep {count} of {len(self)} records")
        del self._ends[count:]
        with disk_errors(self.path):
            self._truncate()

    @property
    def _end(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _truncate(self) -> None:
        os.truncate(self.path, self._end)
        sync(self.path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a finished file, which is left as it is."""
    records = []
    with third_party(f"{path}: cannot be read"), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not _is_record(line):
                fault = "not a JSON object" if line.endswith(b"\n") else "an incomplete line"
                raise SimpoError(f"{path}:{number}: {fault}; run the command that writes this file again")
            records.append(_parsed(line, f"{path}:{number}"))
    return records


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of records at once; it is whole or absent, and numbers that are not finite are null."""
    write_text(path, b"".join(map(_line, records)).decode())


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair becomes JSON's own \udXXX


def json_safe(value: Any) -> Any:
    """A JSON value as it is stored: numbers that are not finite are null, and sequences are lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    return [json_safe(item) for item in value] if isinstance(value, list | tuple) else value


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    def finite_number(written: str) -> float:  # NaN and Infinity, which JSON does not have, and 1e999
        if math.isfinite(found := float(written)):
            return found
        raise SimpoError(f"{place}: {written:.20} is not a finite number; write null, or leave it out")

    found: dict[str, Any] = json.loads(line, parse_float=finite_number, parse_constant=finite_number)
    return found


def _with_checksum(line: bytes) -> bytes:
    """A record's line with the digest of the line without it as the last key."""
    digest = hashlib.sha256(line).hexdigest()[:16]
    return line.removesuffix(b"}\n") + f', "{_CHECKSUM}": "{digest}"}}\n'.encode()


def _fits(line: bytes) -> bool:
    return _with_checksum(line.rpartition(f', "{_CHECKSUM}": "'.encode())[0] + b"}\n") == line


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _repaired(path: Path, whole: Callable[[bytes], bool]) -> list[int]:
    """Drop the lines that are not whole; returns where each of the others ends, in bytes from the start of the file."""
    with path.open("rb") as file:
        kept = [(len(line), whole(line)) for line in file]
    if dropped := sum(not fits for _, fits in kept):
        logger.warning("%s: dropped %d damaged lines; a process was killed, or the disk failed", path, dropped)
        with path.open("rb") as file:
            write_text(path, b"".join(line for line, (_, fits) in zip(file, kept, strict=True) if fits).decode())
    return list(accumulate(length for length, fits in kept if fits))
