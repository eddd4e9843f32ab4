"""What a command ran on: versions, machine and the state of the code, nothing that names a person or a host."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

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
