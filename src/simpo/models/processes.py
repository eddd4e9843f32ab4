"""Values that the processes of one run share."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed as dist

Value = TypeVar("Value")


def from_main(value: Value, group: dist.ProcessGroup | None = None) -> Value:
    """The main process's ``value`` in every process; all have to call it. It can be any object that pickles."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group)
    return values[0]
