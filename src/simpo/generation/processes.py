"""The processes that ``torchrun`` starts for one sampling run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from simpo.errors import SimpoError
from simpo.models.devices import from_main

# A process that has done its share waits for the slowest one; processes that end are noticed at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among those that share a run without training together.

    Attributes:
        rank: its number; process 0 is the main one, which alone reads, logs and writes what concerns the whole run.
        size: the number of processes.
        group: the group in which they exchange objects, if there are several.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls) -> Processes:
        """Join the processes that were started together; each takes an accelerator of its own if there are any."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.accelerator.is_available():
            if number >= (count := torch.accelerator.device_count()):
                raise SimpoError(
                    f"nproc_per_node: process {number} has no accelerator, there are {count}; start {count}"
                )
            torch.accelerator.set_device_index(number)
        if not dist.is_initialized():
            dist.init_process_group()
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # only small objects are exchanged
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def from_main(self, value: Any = None) -> Any:
        """The main process's ``value`` in every process; all have to call it."""
        with _peer_errors():
            return from_main(value, self.group)

    def wait(self) -> None:
        """Return when every process has called it."""
        if self.size > 1:
            with _peer_errors():
                dist.barrier(group=self.group)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn the error of a group whose other process has ended into one line."""
    try:
        yield
    except RuntimeError as error:
        raise SimpoError(
            "another process has ended; its own message says why, and the same command continues"
        ) from error
