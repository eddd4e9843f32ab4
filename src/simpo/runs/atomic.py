"""Files and folders that are whole or absent, whenever the process is killed and however full the disk is."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simpo.errors import SimpoError

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
