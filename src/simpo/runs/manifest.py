"""``manifest.json`` (sizes and hashes of a folder's files), and the versions that made them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Collection
from contextlib import suppress
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from simpo.runs.atomic import disk_errors, write_text

FILE_NAME = "manifest.json"


SCHEMA = 1


def write_manifest(folder: Path, *, exclude: Collection[str] = ()) -> None:
    """List all files in ``folder`` and below, with size in bytes and SHA-256, in ``folder/manifest.json``.

    Args:
        folder: of finished files.
        exclude: patterns of names in ``folder`` (``*`` and ``?``) that are left out with all that is below them.

    Raises:
        SimpoError: the manifest cannot be written, or a file cannot be read.
    """
    with disk_errors(folder / FILE_NAME):
        names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        files = [
            {"path": name.as_posix(), "bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
            for name in sorted(names, key=Path.as_posix)
            if not any(fnmatch(name.parts[0], pattern) for pattern in (FILE_NAME, *exclude))
        ]
    write_text(folder / FILE_NAME, json.dumps({"schema": SCHEMA, "files": files}, indent=2, ensure_ascii=False) + "\n")


def damage(folder: Path) -> str | None:
    """The first fault of a folder's files against its manifest, in words; None if all are as they were written.

    Files that the manifest does not list are not looked at. Sizes come first, because hashing takes long.
    """
    try:
        files = read_manifest(folder)
    except FileNotFoundError:
        return f"no {FILE_NAME}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{FILE_NAME}: not readable"
    for find in (_misplaced, _resized, _changed):
        for name, size, digest in files:
            if fault := find(folder, name, size, digest):
                return f"{name}: {fault}"
    return None


def read_manifest(folder: Path) -> list[tuple[str, int, str]]:
    """Path, size in bytes and SHA-256 of every file that a folder's manifest lists.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError, KeyError, TypeError: it is not a manifest.
    """
    document: Any = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r}")
    return [(str(file["path"]), int(file["bytes"]), str(file["sha256"])) for file in document["files"]]


def _misplaced(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = PurePosixPath(name)
    return "not in this folder" if path.is_absolute() or ".." in path.parts else None


def _resized(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return "missing"
    found = path.stat().st_size
    return None if found == size else f"{found:,} bytes instead of {size:,}"


def _changed(folder: Path, name: str, size: int, digest: str) -> str | None:
    try:
        return None if _digest(folder / name) == digest else "contents changed (sha256)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- What a command ran on: versions, machine and the state of the code, nothing that names a person or a
# host.


_PACKAGES = ("simpo", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "safetensors", "numpy")


_PATIENCE = 10  # seconds for another program's answer


def environment() -> dict[str, Any]:
    """Versions, processors, memory and the working directory's git state, as JSON values.

    It neither imports torch nor starts CUDA, which no process could fork after.

    Returns:
        ``python``, ``platform``, ``packages`` (name -> version, None if absent), ``cpu`` (``model``, usable
        ``cores``), ``ram_bytes``, ``gpus`` (names of the machine's NVIDIA GPUs), and ``git`` (``commit`` and
        whether tracked files are ``dirty``; None outside a repository).
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"model": _cpu_model(), "cores": _usable_cores()},
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": (_answer("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines(),
        "git": _git(),
    }


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _git() -> dict[str, Any] | None:
    commit = _answer("git", "rev-parse", "HEAD")
    # Without the index lock, in which another git may be at work, and without the folders that runs add.
    changes = _answer("git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _answer(*command: str) -> str | None:
    """What another program prints; None if it is not there, fails or takes too long."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)  # noqa: S603
        return done.stdout.strip()
    return None
