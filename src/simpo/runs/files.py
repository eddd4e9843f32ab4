"""Atomic writes: a killed process or a full disk never leaves a half-written file or folder behind."""

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

# Hidden names for work in progress: `.NAME.partial` is being written, `.NAME.removed` is being deleted.
_PARTIAL, _REMOVED = "partial", "removed"

# Not every failed write raises an OSError. safetensors: "I/O error: No space left on device (os error 28)". torch:
# "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534" or "write(): fd 3 failed with No space ...".
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|iostream error|write\(\): fd")

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NEARLY_FULL = 1 << 20  # bytes; if less is free, a write that failed without a reason is blamed on the full disk


def write_text(path: Path, text: str) -> None:
    """Write ``path`` as UTF-8, creating its folder; after a crash it holds either the old text or the new one."""
    # In the same folder, because a rename is only atomic within one file system.
    temporary = _hidden(path, f"{os.getpid()}.{_PARTIAL}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("x", encoding="utf-8") as file:  # "x" refuses to follow a planted symlink
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
    """Create a folder atomically: fill the yielded one, and it is renamed to ``final`` once everything is on disk.

    Yields:
        The folder under its provisional name. It is removed if the body raises. If the process is killed, the next
        call or :func:`remove_leftovers` removes it.

    Raises:
        FileExistsError: ``final`` exists.
        SimpoError: the disk is full or the folder cannot be written, whether here or in the body; see
            :func:`disk_errors`.
    """
    if final.exists():
        raise FileExistsError(f"{final} already exists")
    partial = provisional(final)
    with disk_errors(final):
        _delete(partial)
        partial.mkdir(parents=True)
    try:
        with disk_errors(final):  # before the cleanup below frees the space that explains the error
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
    """Add files to ``folder``: fill the yielded folder, and its files are moved once all of them are on disk.

    Files of the same name are replaced, others stay. If the body raises, the yielded folder is removed.
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
    """Return the path that :func:`staged_folder` yields for ``final``."""
    return _hidden(final, _PARTIAL)


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: its name never refers to a half-deleted folder."""
    renamed = _hidden(path, _REMOVED)
    with disk_errors(path):
        _delete(renamed)
        path.rename(renamed)
        _delete(renamed)


def remove_leftovers(parent: Path) -> None:
    """Remove the unfinished files and folders that killed processes left in ``parent``.

    Only the process that owns the folder may call this: the unfinished work of a live process looks the same.
    """
    with disk_errors(parent):
        for kind in (_PARTIAL, _REMOVED):
            for leftover in parent.glob(f".*.{kind}"):
                _delete(leftover)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
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
    """Report failed writes as a one-line error about ``path``.

    Raises:
        SimpoError: in place of an ``OSError``, or of the errors that safetensors and torch raise for a failed write.
    """
    try:
        yield
    except SimpoError:
        raise
    except Exception as error:
        reason = _write_failure(error, Path(path))
        if reason is None:
            raise
        raise SimpoError(f"{path}: {reason}") from error


def _write_failure(error: Exception, path: Path) -> str | None:
    """Explain the failed write behind ``error``; return None if the error has another cause."""
    text = str(error)
    os_error = _OS_ERROR.search(text)
    if isinstance(error, ConnectionError | TimeoutError):
        return None
    if isinstance(error, OSError):
        code = error.errno
    elif os_error or _TORCH_WRITER.search(text):
        code = int(os_error[1]) if os_error else None
    else:
        return None
    full = code in _DISK_FULL or os.strerror(errno.ENOSPC) in text
    if code is None and not full:  # numpy and torch do not always give a reason
        existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        full = shutil.disk_usage(existing).free < _NEARLY_FULL
    if full:
        return "no space left on the disk; free some space and rerun the same command: existing files are intact"
    reason = os.strerror(code) if code else text.partition("\n")[0]
    if code in _NOT_PERMITTED:
        return f"cannot be written ({reason}); make it writable or use another folder"
    return f"cannot be written: {reason}"


# ---- JSON Lines that survive a kill.

logger = logging.getLogger(__name__)

_CHECKSUM = "sha256"


class JsonLines:
    """An append-only file of JSON objects, one per line; ``len()`` is the number of records.

    Opening the file drops damaged lines, such as a last line that a killed process left incomplete, and warns how many
    there were; the caller has to recompute their contents. Only one process may write at a time.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, *, checked: bool = False) -> None:
        """Open ``path``, creating it and its folder if needed.

        If ``checked``, every line carries a checksum, and a line that does not match it counts as damaged.
        """
        self.path = Path(path)
        self._checked = checked
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self.path.touch()
            sync(self.path.parent)
            # Byte offset of the end of each record.
            self._ends = _drop_damaged_lines(self.path, _matches_checksum if checked else _is_record)

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
        """Append records; they are on disk when this returns.

        JSON has no NaN or infinity. They are stored as null, so that a diverged run keeps its other metrics.

        Raises:
            SimpoError: the disk is full or the file cannot be written; its contents are unchanged.
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
                with suppress(OSError):  # the original error is the one to report
                    self._truncate()
                raise
        for line in lines:
            self._ends.append(self._end + len(line))

    def keep(self, count: int) -> None:
        """Drop all but the first ``count`` records, for a run that resumes from an earlier point."""
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
    """Read the records of a complete file without modifying it."""
    records, advice = [], "rerun the command that writes this file"
    with third_party(f"{path}: cannot be read"), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                raise SimpoError(f"{path}:{number}: incomplete line; {advice}")
            with third_party(f"{path}:{number}: not JSON; {advice}"):
                record = _parsed(line, f"{path}:{number}")
            if not isinstance(record, dict):
                raise SimpoError(f"{path}:{number}: not a JSON object; {advice}")
            records.append(record)
    return records


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write all records of a file atomically; non-finite numbers become null."""
    write_text(path, b"".join(map(_line, records)).decode())


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes JSON's own \udXXX


def json_safe(value: Any) -> Any:
    """Convert a value for JSON: non-finite numbers become None, and sequences become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    return [json_safe(item) for item in value] if isinstance(value, list | tuple) else value


def _parsed(line: bytes, place: str) -> Any:
    def finite_number(literal: str) -> float:  # rejects NaN and Infinity, which JSON does not have, and 1e999
        if math.isfinite(number := float(literal)):
            return number
        raise SimpoError(f"{place}: {literal:.20} is not a finite number; write null or leave it out")

    return json.loads(line, parse_float=finite_number, parse_constant=finite_number)


def _with_checksum(line: bytes) -> bytes:
    """Add a digest of the line to its record, as the last key."""
    digest = hashlib.sha256(line).hexdigest()[:16]
    return line.removesuffix(b"}\n") + f', "{_CHECKSUM}": "{digest}"}}\n'.encode()


def _matches_checksum(line: bytes) -> bool:
    return _with_checksum(line.rpartition(f', "{_CHECKSUM}": "'.encode())[0] + b"}\n") == line


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _drop_damaged_lines(path: Path, is_intact: Callable[[bytes], bool]) -> list[int]:
    """Remove damaged lines from the file, and return the byte offset at which each of the others ends."""
    with path.open("rb") as file:
        lines = [(len(line), is_intact(line)) for line in file]
    if dropped := sum(not intact for _, intact in lines):
        logger.warning("%s: dropped %d damaged lines; a process was killed, or the disk failed", path, dropped)
        with path.open("rb") as file:
            write_text(path, b"".join(line for line, (_, intact) in zip(file, lines, strict=True) if intact).decode())
    return list(accumulate(length for length, intact in lines if intact))
