"""One trial of a sweep: an ordinary training run in a folder of its own, watched at its evaluations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from simpo.errors import SimpoError
from simpo.results import FILE_NAME, Metric, read_results
from simpo.runs import record
from simpo.training.run import Given, run_training
from simpo.training.tasks import Task


class Pruned(Exception):  # noqa: N818 - nothing went wrong
    """The trial has been broken off because others did better by then."""


class Failed(Exception):  # noqa: N818 - a result like others
    """The trial cannot be finished, for a reason of its own; the message says which."""


def run_trial(task: Task, given: Given, folder: Path, metric: str, *, prune: Any | None = None) -> Metric:
    """Train in ``folder``, or continue there, and read the held-out metric after training.

    Args:
        task: the kind of training.
        given: the recipe with the trial's values; its output folder is ``folder``.
        folder: of the trial.
        metric: its name in ``results.json``.
        prune: the Optuna trial that hears every evaluation and may break the training off; None for no pruning.

    Raises:
        Pruned: others did better by then.
        Failed: the training or its result is of no use, and that is the trial's own doing.
        SimpoError: something outside the trial is in the way (data, model, disk), or the folder was never begun.
    """
    try:
        results = run_training(task if prune is None else watched(task, _Report(prune, metric)), given)
    except torch.OutOfMemoryError as error:
        raise Failed(f"out of memory: {' '.join(str(error).split())[:200]}") from error
    except SimpoError as error:
        # What the disk, the hub or a file refuses has a cause, and would be in the next trial's way too.
        if error.__cause__ is not None or not (folder / record.FILE_NAME).exists():
            raise
        raise Failed(str(error)) from error
    return _held_out(results, metric)


def _held_out(results: Path, name: str) -> Metric:
    found = next((m for m in read_results(results).metrics if m.name == name and m.stage == "after"), None)
    if found is None:
        raise SimpoError(f"{results} has no {name}; name held-out pairs (eval_dataset_name)")
    if found.value is None:
        raise Failed(f"{name} is not a finite number")
    return found


def read_metric(folder: Path, name: str) -> Metric:
    """The metric of a trial that has finished."""
    return _held_out(folder / FILE_NAME, name)


def watched(task: Task, callback: TrainerCallback) -> Task:
    """The task with a trainer that has one more callback."""

    class Watched(task.trainer):  # type: ignore[name-defined,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(callback)

    return dataclasses.replace(task, trainer=Watched)


class _Report(TrainerCallback):
    """Tells an Optuna trial of every evaluation, and ends the training where it says so."""

    def __init__(self, trial: Any, metric: str) -> None:
        self._trial, self._metric = trial, metric

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Report, and ask whether to go on."""
        self._trial.report(metrics[self._metric], state.global_step)
        if self._trial.should_prune():
            raise Pruned(f"after step {state.global_step}")
