"""Code that several commands share: training recipes, loading a model, and running in one process."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.config import parse_settings
from simpo.errors import SimpoError
from simpo.models.settings import ModelArguments
from simpo.training.settings import REPLACES, DataArguments

if TYPE_CHECKING:  # trainers and engines take seconds to import, and --help and mistakes in recipes do not need them
    from simpo.training.callbacks import RunCallback
    from simpo.training.packed import PackedTrainer
    from simpo.training.run import TrainingJob

logger = logging.getLogger(__name__)

# What transformers calls the folder if nobody does.
_UNNAMED = "trainer_output"


# Trains only if the run fits this machine.
PLAN_FIRST = "--plan"
# The keys of commands that load a model and do not train it.
LOADING = frozenset(("model_name_or_path", "model_revision", "dtype", "trust_remote_code", "allow_pickle"))


def require_single_process(command: str, remedy: str) -> None:
    """Raise :class:`SimpoError` if a launcher such as ``torchrun`` started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SimpoError(f"simpo {command} runs in one process; {remedy}")


def parse(argv: list[str], config_type: type, *more: type, command: str = "", about: str | None = None) -> Any:
    """Model, data and configuration of a training recipe and command line, and instances of ``more`` dataclasses."""
    types = (ModelArguments, DataArguments, config_type, *more)
    if command:
        argv = [argument for argument in argv if argument != PLAN_FIRST]
    parts = parse_settings(argv, types, command=command, about=about, replaces=REPLACES)
    check_named(parts[2])
    return parts


def recipe_of(argv: list[str]) -> Path | None:
    """The recipe, if the command line starts with one."""
    given = bool(argv) and (argv[0].endswith((".yaml", ".yml")) or Path(argv[0]).is_file())
    return Path(argv[0]) if given else None


def check_named(config: Any) -> None:
    """Raise :class:`SimpoError` unless the user named the folder of the run."""
    if config.output_dir == _UNNAMED:
        raise SimpoError("output_dir is missing: give it in the recipe or as --output_dir")


def make_job(
    kind: type[PackedTrainer], parts: Sequence[Any], argv: list[str], callbacks: Sequence[RunCallback] = ()
) -> TrainingJob:
    """The job of the parsed ``parts`` of a training recipe and command line, with further ``callbacks``."""
    from simpo.evaluation.during_training import Generations  # noqa: PLC0415
    from simpo.training.run import TrainingJob  # noqa: PLC0415

    model, data, config, *more = parts
    generations = [Generations(more[0], model)] if more and more[0].eval_generations else []
    config.disable_tqdm = config.disable_tqdm or not sys.stderr.isatty()  # the log has the progress there
    return TrainingJob(model, data, config, argv, recipe_of(argv), [*callbacks, *generations])


def run(
    kind: type[PackedTrainer],
    parts: Sequence[Any],
    argv: list[str],
    *,
    following: str,
    callbacks: Sequence[RunCallback] = (),
) -> int:
    """Train with the settings ``parts``, print the results and the command that may follow.

    ``following`` is that command, with ``{folder}`` for the output folder; ``callbacks`` are further parts of the run.
    """
    from simpo.cli.plan import check_fit  # noqa: PLC0415
    from simpo.runs.results import print_results  # noqa: PLC0415
    from simpo.training.run import run_training  # noqa: PLC0415
    from simpo.training.trackers import Trackers  # noqa: PLC0415

    if PLAN_FIRST in argv:
        check_fit(kind.command, parts)
    trackers = Trackers()
    job = make_job(kind, parts, argv, [*callbacks, trackers])
    results = run_training(kind, job)
    if job.config.process_index == 0:
        folder = job.config.output_dir
        print_results(results)
        print(f"saved: {folder}")
        trackers.publish(Path(folder), print_report(Path(folder)))
        print(f"next:  {following.format(folder=shlex.quote(folder))}")
    return 0


def print_report(folder: Path) -> Path | None:
    """Write a finished run's report, unless there is one since it finished, and print its path.

    A report that fails does not undo the run.
    """
    from simpo.analysis.report import FILE_NAME, write_report  # noqa: PLC0415
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
