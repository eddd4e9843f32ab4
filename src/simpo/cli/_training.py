"""What the commands that take a training recipe have in common."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from simpo.config import parse_recipe
from simpo.errors import SimpoError
from simpo.evaluation.during_training import GenerationArguments, Generations
from simpo.models.settings import ModelArguments
from simpo.runs.results import print_results
from simpo.training.run import TrainingJob, run_training
from simpo.training.settings import DataArguments
from simpo.training.tasks import Task

# What transformers calls the folder if nobody does.
_UNNAMED = "trainer_output"
# Ways to name the data that exclude one another; one on the command line replaces the recipe's.
REPLACES = {
    "dataset_name": ("dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture"),
    "dataset_mixer": ("dataset_name", "dataset_mixture"),
    "dataset_mixture": ("dataset_name", "dataset_mixer", "dataset_splits", "dataset_configs"),
}


def parse(argv: list[str], config_type: type, *more: type) -> tuple[Any, ...]:
    """Model, data and configuration of a training recipe and command line, and what ``more`` dataclasses have."""
    types = (ModelArguments, DataArguments, config_type, *more)
    parts = parse_recipe(with_model_named(argv), types, replaces=REPLACES)
    check_named(parts[2])
    return parts


def recipe_of(argv: list[str]) -> Path | None:
    """The recipe, if the command line starts with one."""
    given = bool(argv) and (argv[0].endswith((".yaml", ".yml")) or Path(argv[0]).is_file())
    return Path(argv[0]) if given else None


def with_model_named(argv: list[str]) -> list[str]:
    """The command line with ``model_name_or_path`` for ``--model`` and for a model in the place before the options."""
    argv = [re.sub(r"^--model(?=$|=)", "--model_name_or_path", word) for word in argv]
    place = 0 if recipe_of(argv) is None else 1
    if len(argv) <= place or argv[place].startswith("-"):
        return argv
    return [*argv[:place], "--model_name_or_path", *argv[place:]]


def check_named(config: Any) -> None:
    """Look whether the user named the folder of the run.

    Raises:
        SimpoError: nobody did.
    """
    if config.output_dir == _UNNAMED:
        raise SimpoError("output_dir is missing: give it in the recipe or as --output_dir")


def read(task: Task, config_type: type, argv: list[str]) -> TrainingJob:
    """What a training recipe and command line give, all of it."""
    model, data, config, *more = parse(argv, config_type, *([GenerationArguments] if task.generates else []))
    callbacks = [Generations(more[0], model)] if more and more[0].eval_generations else []
    config.disable_tqdm = config.disable_tqdm or not sys.stderr.isatty()  # the log has the progress there
    return TrainingJob(model, data, config, argv, recipe_of(argv), callbacks)


def run(task: Task, config_type: type, argv: list[str], *, following: str) -> int:
    """Parse ``argv``, train, print the table of results and the command that may follow.

    Args:
        task: the kind of training.
        config_type: its configuration.
        argv: the arguments.
        following: the next command, with ``{folder}`` for the output folder.
    """
    given = read(task, config_type, argv)
    results = run_training(task, given)
    if given.config.process_index == 0:
        folder = given.config.output_dir
        print_results(results)
        print(f"saved: {folder}\nnext:  {following.format(folder=shlex.quote(folder))}")
    return 0
