"""One trial of a sweep: an ordinary training run in a folder of its own, watched at its evaluations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from simpo.errors import SimpoError
from simpo.runs.folder import FILE_NAME as RECORD
from simpo.runs.lines import read_lines
from simpo.runs.results import FILE_NAME, Metric, read_results
from simpo.training.callbacks import RunCallback
from simpo.training.run import TrainingJob, run_training
from simpo.training.tasks import Task
from simpo.workflows.sweep.study import TrialLease

WIN_RATE = "eval_generations/win_rate"  # of evaluations while training alone
_LOGS = "metrics.jsonl"


class Pruned(Exception):  # noqa: N818 - nothing went wrong
    """The trial has been broken off because others did better by then."""


class Failed(Exception):  # noqa: N818 - a result like others
    """The trial cannot be finished, for a reason of its own; the message says which."""


def run_trial(task: Task, given: TrainingJob, folder: Path, metric: str, *, prune: TrialLease | None = None) -> Metric:
    """Train in ``folder``, or continue there, and read the held-out metric after training.

    Args:
        task: the kind of training.
        given: the recipe with the trial's values; its output folder is ``folder``.
        folder: of the trial.
        metric: its name in ``results.json``, or :data:`WIN_RATE`.
        prune: the sweep's claim, which hears every evaluation and may break the training off; None for no pruning.

    Raises:
        Pruned: others did better by then.
        Failed: the training or its result is of no use, and that is the trial's own doing.
        SimpoError: something outside the trial is in the way (data, model, disk), or the folder was never begun.
    """
    callbacks = [*given.callbacks, _CheckMetric(metric), *([] if prune is None else [_Report(prune, metric)])]
    try:
        run_training(task, dataclasses.replace(given, callbacks=callbacks))
    except torch.OutOfMemoryError as error:
        raise Failed(f"out of memory: {' '.join(str(error).split())[:200]}") from error
    except SimpoError as error:
        # What the disk, the hub or a file refuses has a cause, and would be in the next trial's way too.
        if error.__cause__ is not None or not (folder / RECORD).exists():
            raise
        raise Failed(str(error)) from error
    return read_metric(folder, metric)


def read_metric(folder: Path, name: str) -> Metric:
    """The metric of a trial that has finished.

    Raises:
        Failed: it is not a finite number.
    """
    found = _last_evaluation(folder, name) if name == WIN_RATE else _after_training(folder, name)
    if found.value is None:
        raise Failed(f"{name} is not a finite number")
    return found


def _after_training(folder: Path, name: str) -> Metric:
    metrics = read_results(folder / FILE_NAME).metrics
    return next(metric for metric in metrics if (metric.name, metric.stage) == (name, "after"))


def _last_evaluation(folder: Path, name: str) -> Metric:
    values = [line[name] for line in read_lines(folder / _LOGS) if name in line]
    if not values:
        raise SimpoError(f"--metric: {folder} was trained without an evaluation; lower eval_steps")
    return Metric(name, values[-1])


class _CheckMetric(RunCallback):
    """Checks, before anything is written, that the trial's evaluations have the metric of the sweep."""

    def __init__(self, metric: str) -> None:
        self._metric = metric

    def check_trainer(self, trainer: Trainer) -> None:
        """Raise :class:`SimpoError` if they do not."""
        if trainer.eval_dataset is None:
            raise SimpoError("eval_dataset_name: name held-out pairs, which the trials are compared on")
        known = [f"eval_{name}" for name in trainer.metric_names]
        if self._metric not in (*known, WIN_RATE):
            raise SimpoError(f"--metric: these rows have no {self._metric}; there are {', '.join(known)}")


class _Report(TrainerCallback):
    """Tells a sweep of every evaluation, and ends the training where it says so."""

    def __init__(self, claim: TrialLease, metric: str) -> None:
        self._claim, self._metric = claim, metric

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Report, and ask whether to go on."""
        if self._claim.report(metrics[self._metric], state.global_step):
            raise Pruned(f"after step {state.global_step}")
