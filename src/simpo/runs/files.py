"""Files and folders that are whole or absent, whenever the process is killed and however full the disk is."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from simpo.errors import SimpoError, third_party

# Incomplete files and folders are called `.NAME.partial` (being written) or `.NAME.removed` (being removed).
_PARTIAL, _REMOVED = "partial", "removed"

# Failed writes that are not an OSError. safetensors: "I/O error: No space left on device (os error 28)". torch:
# "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534" or "write(): fd 3 failed with No space ...".
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|iostream error|write\(\): fd")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_ROOM = 1 << 20  # bytes; with less than this left, a write that failed for no stated reason failed for lack of space


def write_text(path: Path, text: str) -> None:
    """Write ``path`` in UTF-8, and create its folder; after a crash it is the old file or the new one."""
    # In the same folder, because a rename is atomic only within one file system.
    temporary = _hidden(path, f"{os.getpid()}.{_PARTIAL}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("x", encoding="utf-8") as file:  # never through a link that somebody left there
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill, which is renamed to ``final`` when its contents are on the disk.

    Yields:
        The folder under its provisional name. It is removed if the body raises; what a killed process left is removed
        by the next call or by :func:`remove_leftovers`.

    Raises:
        FileExistsError: ``final`` exists.
        SimpoError: the disk is full or the folder cannot be written, also when the body raised that; see
            :func:`disk_errors`.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    partial = provisional(final)
    with disk_errors(final):
        _delete(partial)
        partial.mkdir(parents=True)
    try:
        with disk_errors(final):  # inside, so that a full disk is examined while it is still full
            yield partial
            for path in partial.rglob("*"):
                if path.is_file() or path.is_dir():
                    sync(path)
            sync(partial)
            partial.rename(final)
            sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, whose files move into ``folder`` one by one when all are on the disk.

    They replace files of the same names; other files stay. The folder that is yielded is removed if the body raises.
    """
    filled = folder / ".files"
    with disk_errors(folder):
        _delete(filled)
        with staged_folder(filled) as partial:
            yield partial
        for path in sorted(filled.iterdir()):
            path.replace(folder / path.name)
        filled.rmdir()
        sync(folder)


def provisional(final: Path) -> Path:
    """The name of the folder that :func:`staged_folder` yields for ``final``."""
    return _hidden(final, _PARTIAL)


def remove_folder(path: Path) -> None:
    """Remove a folder, so that no part of it is ever seen under its name."""
    renamed = _hidden(path, _REMOVED)
    with disk_errors(path):
        _delete(renamed)
        path.rename(renamed)
        _delete(renamed)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left incomplete in ``parent``.

    Only for the one process that writes there: the unfinished work of a living process looks the same.
    """
    with disk_errors(parent):
        for kind in (_PARTIAL, _REMOVED):
            for leftover in parent.glob(f".*.{kind}"):
                _delete(leftover)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn failed writes into one line about ``path``.

    Raises:
        SimpoError: instead of an ``OSError``, and of what safetensors and torch raise when a write fails.
    """
    try:
        yield
    except SimpoError:
        raise
    except Exception as error:
        fault = _fault(error, Path(path))
        if fault is None:
            raise
        raise SimpoError(f"{path}: {fault}") from error


def _fault(error: Exception, path: Path) -> str | None:
    """Describe the disk's fault behind ``error``; None if the error has another cause."""
    text = str(error)
    found = _OS_ERROR.search(text)
    if isinstance(error, ConnectionError | TimeoutError):
        return None
    if isinstance(error, OSError):
        code = error.errno
    elif found or _TORCH_WRITER.search(text):
        code = int(found[1]) if found else None
    else:
        return None
    full = code in _FULL or os.strerror(errno.ENOSPC) in text
    if code is None and not full:  # numpy's OSError and torch's errors do not state the reason
        existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        full = shutil.disk_usage(existing).free < _NO_ROOM
    if full:
        return "no space left on the disk; free some and run the same command again: nothing earlier was damaged"
    reason = os.strerror(code) if code else text.partition("\n")[0]
    if code in _FORBIDDEN:
        return f"cannot be written ({reason}); make it writable or name another folder"
    return f"cannot be written: {reason}"


# ---- JSON Lines, which stay whole when a command is killed.

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
