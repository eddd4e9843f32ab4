"""Commands that run in one process."""

from __future__ import annotations

import os

from simpo.errors import SimpoError


def refuse_several(command: str, instead: str) -> None:
    """Look whether a launcher such as ``torchrun`` started several processes, each of which would do all of it.

    Args:
        command: its name.
        instead: what to do about it, for the message.

    Raises:
        SimpoError: it did.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SimpoError(f"simpo {command} runs in one process; {instead}")
