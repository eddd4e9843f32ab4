"""The processes that ``torchrun`` starts: they exchange a few objects, share work and wait for one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from simpo.errors import SimpoError

# One that has done its share waits for the slowest; those that end are noticed at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among all that share a run.

    Attributes:
        rank: its number; 0 is the main one, which alone reads, says and writes what concerns the whole run.
        size: how many there are.
        group: through which they exchange objects, where they are several.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the main one."""
        return self.rank == 0

    def from_main(self, value: Any = None) -> Any:
        """The main process's ``value``, in every process; all have to call it.

        Raises:
            SimpoError: another process has ended.
        """
        if self.size == 1:
            return value
        values = [value]
        with _peers():
            dist.broadcast_object_list(values, group=self.group)
        return values[0]

    def wait(self) -> None:
        """Return when every process has called it.

        Raises:
            SimpoError: another process has ended.
        """
        if self.size > 1:
            with _peers():
                dist.barrier(group=self.group)


def joined_processes() -> Processes:
    """Join those that were started together, each with an accelerator of its own where there are any.

    Raises:
        SimpoError: more processes than accelerators.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    _take_accelerator(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # nothing large is exchanged
    return Processes(dist.get_rank(), dist.get_world_size(), group)


def _take_accelerator(number: int) -> None:
    if not torch.accelerator.is_available():
        return
    if number >= (count := torch.accelerator.device_count()):
        raise SimpoError(f"nproc_per_node: process {number} has no accelerator, there are {count}; start {count}")
    torch.accelerator.set_device_index(number)


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SimpoError(
            "another process has ended; its own message says why, and the same command continues"
        ) from error
