"""Helpers shared by commands: settings of single-process commands, and the report written after a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simpo.config import parse_settings
from simpo.errors import SimpoError

logger = logging.getLogger(__name__)

# Model keys of commands that load a model but do not train it.
LOADING = frozenset(("model_name_or_path", "model_revision", "dtype", "trust_remote_code", "allow_pickle"))


def read_settings(
    command: Callable[[list[str]], None], kind: type, argv: list[str], *, remedy: str = "start it without torchrun"
) -> Any:
    """Parse the settings of a single-process command into an instance of ``kind``.

    ``remedy`` tells users of a launcher such as ``torchrun`` what to do instead.
    """
    (settings,) = parse_settings(argv, (kind,), command=command.__name__, about=command.__doc__)
    require_single_process(command.__name__, remedy)
    return settings


def require_single_process(command: str, remedy: str) -> None:
    """Raise :class:`SimpoError` if a launcher such as ``torchrun`` started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SimpoError(f"simpo {command} runs in one process; {remedy}")


def recipe_of(argv: list[str]) -> Path | None:
    """Return the recipe's path if the command line starts with one."""
    has_recipe = bool(argv) and (argv[0].endswith((".yaml", ".yml")) or Path(argv[0]).is_file())
    return Path(argv[0]) if has_recipe else None


def print_report(folder: Path) -> Path | None:
    """Write a finished run's report unless it is up to date, print its path and return it.

    If writing fails, log a warning and return None: the run itself has succeeded.
    """
    from simpo.analysis.report import FILE_NAME, write_report  # noqa: PLC0415 - slow, and --help does not need it
    from simpo.runs.folder import FILE_NAME as RECORD  # noqa: PLC0415

    path = folder / FILE_NAME
    try:
        # A run writes its record last, so an older report predates the end of the run.
        up_to_date = path.is_file() and path.stat().st_mtime_ns >= (folder / RECORD).stat().st_mtime_ns
        report = path if up_to_date else write_report([folder])
    except Exception as error:
        logger.warning(
            "could not write the report (%s: %s); try again with: simpo report %s", type(error).__name__, error, folder
        )
        return None
    print(f"report: {report}")
    return report
