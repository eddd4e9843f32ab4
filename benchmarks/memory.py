"""Memory use of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

MEBIBYTE = 2**20


def in_use_mib(device: str) -> float:
    """Return the current memory use of this process in MiB (of PyTorch's allocator with CUDA)."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / MEBIBYTE
    return psutil.Process().memory_info().rss / MEBIBYTE


def peak_mib(device: str) -> float:
    """Return the peak memory use of this process in MiB (of PyTorch's allocator with CUDA)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MEBIBYTE
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss is inherited from the parent process and may be too high
        kibibytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(kibibytes) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MEBIBYTE if sys.platform == "darwin" else 1024)
