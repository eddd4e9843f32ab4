"""``manifest.json``, the sizes and hashes of a folder's files, and a description of the machine a command ran on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from simpo.errors import SimpoError, third_party
from simpo.runs.files import disk_errors, write_text

logger = logging.getLogger(__name__)

FILE_NAME = "manifest.json"
SCHEMA = 1

_PACKAGES = ("simpo", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "safetensors", "numpy")
_TIMEOUT = 10  # seconds for git and nvidia-smi


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with third_party(f"{path}: cannot be read"), Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digest(path: Path) -> None:
    """Store a file's digest next to it in ``.NAME.sha256``, for :func:`is_intact`."""
    write_text(_digest_file(path), file_digest(path))


def is_intact(path: Path) -> bool:
    """Whether a file exists and matches its stored digest; warns if it exists but does not match."""
    if not path.exists():
        return False
    intact = _digest_file(path).exists() and _digest_file(path).read_bytes() == file_digest(path).encode()
    if not intact:
        logger.warning("%s is damaged and will not be used", path)
    return intact


def _digest_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def write_manifest(folder: Path, *, exclude: Collection[str] = ()) -> None:
    """List all files in ``folder`` and its subfolders, with size in bytes and SHA-256, in ``folder/manifest.json``.

    ``exclude`` holds glob patterns, matched against the relative path of a file and against its first component.
    """
    with disk_errors(folder / FILE_NAME):
        names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        files = [
            {"path": name.as_posix(), "bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
            for name in sorted(names, key=Path.as_posix)
            if not any(
                fnmatch(text, pattern) for text in (name.parts[0], name.as_posix()) for pattern in (FILE_NAME, *exclude)
            )
        ]
    write_text(folder / FILE_NAME, json.dumps({"schema": SCHEMA, "files": files}, indent=2, ensure_ascii=False) + "\n")


def find_damage(folder: Path, *, since: int | None = None) -> str | None:
    """Describe the first file that does not match the folder's manifest; return None if all of them match.

    Files not in the manifest are ignored. Sizes are compared first because hashing is slow. With ``since``, a time in
    nanoseconds, only files modified after it are hashed.
    """
    try:
        files = read_manifest(folder)
    except FileNotFoundError:
        return f"no {FILE_NAME}"
    except SimpoError:
        return f"{FILE_NAME}: not readable"
    return next(_differences(folder, files, since), None)


def _differences(folder: Path, files: list[tuple[str, int, str]], since: int | None) -> Iterator[str]:
    for name, _, _ in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            yield f"{name}: not in this folder"
    for name, size, _ in files:
        if not (folder / name).is_file():
            yield f"{name}: missing"
        elif (found := (folder / name).stat().st_size) != size:
            yield f"{name}: {found:,} bytes instead of {size:,}"
    for name, _, digest in files:
        try:
            unmodified = since is not None and (folder / name).stat().st_mtime_ns <= since
            if not unmodified and file_digest(folder / name) != digest:
                yield f"{name}: contents changed (sha256)"
        except SimpoError as error:
            yield str(error)


def read_manifest(folder: Path) -> list[tuple[str, int, str]]:
    """Read the path, size in bytes and SHA-256 of every file in a folder's manifest.

    Raises:
        FileNotFoundError: the folder has no manifest.
        SimpoError: the file cannot be read or is not a manifest.
    """
    path = folder / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(path)
    with third_party(f"{FILE_NAME}: not readable"):
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}")
        return [(str(file["path"]), int(file["bytes"]), str(file["sha256"])) for file in document["files"]]


def environment() -> dict[str, Any]:
    """Describe versions, hardware and the git commit of the working directory, without naming a person or a host.

    Packages map to their version, or None if not installed. This neither imports torch nor initializes CUDA, because
    processes cannot fork safely after that. Uncommitted changes are not checked: ``git status`` runs programs named in
    the repository's configuration, which may not be trustworthy.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    commit = _output("git", "rev-parse", "HEAD")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "cpu": {"model": _cpu_model(), "cores": cores},
        "ram_bytes": psutil.virtual_memory().total,
        "gpus": (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines(),
        "git": None if commit is None else {"commit": commit},
    }


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that may affect results; None for those not installed."""
    return {name: _version(name) for name in _PACKAGES}


def peak_memory() -> dict[str, int]:
    """Return this process's peak memory in bytes: ``host``, and ``device`` if it has used a GPU through torch."""
    peak = {"host": _peak_host_memory()}
    torch = sys.modules.get("torch")  # not imported just for this
    if torch is not None and torch.cuda.is_initialized():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_host_memory() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    with suppress(OSError):  # getrusage would include the memory of the parent process before exec
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if match := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(match[1]) * 1024
    import resource  # noqa: PLC0415 - not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def _output(*command: str) -> str | None:
    """Return the output of another program, or None if it is missing, fails or times out."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)  # noqa: S603
        return done.stdout.strip()
    return None
