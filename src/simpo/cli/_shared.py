"""Code that commands share: settings of a single process, and the report of a finished run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simpo.config import parse_settings
from simpo.errors import SimpoError

logger = logging.getLogger(__name__)

# The keys of commands that load a model and do not train it.
LOADING = frozenset(("model_name_or_path", "model_revision", "dtype", "trust_remote_code", "allow_pickle"))


def read_settings(
    command: Callable[[list[str]], None], kind: type, argv: list[str], *, remedy: str = "start it without torchrun"
) -> Any:
    """The settings of a command that runs in one process: an instance of ``kind``.

    ``remedy`` is what to do where a launcher such as ``torchrun`` started several processes.
    """
    (settings,) = parse_settings(argv, (kind,), command=command.__name__, about=command.__doc__)
    require_single_process(command.__name__, remedy)
    return settings


def require_single_process(command: str, remedy: str) -> None:
    """Raise :class:`SimpoError` if a launcher such as ``torchrun`` started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SimpoError(f"simpo {command} runs in one process; {remedy}")


def recipe_of(argv: list[str]) -> Path | None:
    """The recipe, if the command line starts with one."""
    given = bool(argv) and (argv[0].endswith((".yaml", ".yml")) or Path(argv[0]).is_file())
    return Path(argv[0]) if given else None


def print_report(folder: Path) -> Path | None:
    """Write a finished run's report, unless there is one since it finished, and print its path.

    A report that fails does not undo the run.
    """
    from simpo.analysis.report import FILE_NAME, write_report  # noqa: PLC0415 - slow, and --help does not need it
    from simpo.runs.folder import FILE_NAME as RECORD  # noqa: PLC0415

    path = folder / FILE_NAME
    try:
        # the record is the last that a run writes, so that an older report is of the time before
        kept = path.is_file() and path.stat().st_mtime_ns >= (folder / RECORD).stat().st_mtime_ns
        report = path if kept else write_report([folder])
    except Exception as error:
        logger.warning(
            "no report was written (%s: %s); simpo report %s tries again", type(error).__name__, error, folder
        )
        return None
    print(f"report: {report}")
    return report
