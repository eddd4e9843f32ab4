"""``simpo sweep``: run trials, each an ordinary training run; print them as a table and write the best recipe."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.text import Text
from transformers import Trainer, TrainerControl, TrainerState

from simpo.errors import SimpoError
from simpo.models.checkpoint import model_digest
from simpo.models.devices import free_memory
from simpo.models.loading import check_model_files
from simpo.runs.files import read_lines, write_text
from simpo.runs.folder import FILE_NAME as RECORD
from simpo.runs.folder import DifferentRunError, FolderInUseError, RunFolder, RunRecord
from simpo.runs.log import Log, redact
from simpo.runs.results import FILE_NAME, Metric, make_table, print_full_width, read_results
from simpo.training.batches import rows_digest
from simpo.training.callbacks import RunCallback, check_measured, track_part
from simpo.training.preference import PreferenceTrainer
from simpo.training.run import TrainingJob, prepare_data, run_training
from simpo.workflows.sweep_study import (
    Axis,
    Sampler,
    Study,
    Values,
    combinations,
    load_optuna,
    one_at_a_time,
    values_of,
)

BEST = "best.yaml"
_UNFINISHED = {"PRUNED": "pruned", "FAIL": "failed"}  # Optuna states of trials that did not finish
WIN_RATE = "eval_generations/win_rate"  # only measured by evaluations during training
# Held-out metrics by which trials can be ranked, and whether smaller is better.
SMALLER_IS_BETTER = {
    "eval_rewards/accuracies": False,
    "eval_rewards/margins": False,
    "eval_logps/chosen": False,
    "eval_loss": True,
    WIN_RATE: False,
}


@dataclass(frozen=True)
class Sweep:
    """Definition of a sweep."""

    folder: Path  # output folder
    recipe: Path | None  # recipe shared by all trials; None if the options give all settings
    fixed: Mapping[str, Sequence[str]]  # options shared by all trials: the values after each `--key`
    axes: tuple[Axis, ...]  # the keys that vary
    metric: str  # name of a metric in `results.json` after training, or WIN_RATE (at the last evaluation)
    sampler: Sampler  # `grid` tries every combination, `tpe` samples
    trials: int  # number of trials
    prune: bool  # stop trials that are worse than the median at an evaluation
    read: Callable[[list[str]], TrainingJob]  # parses arguments of `simpo train`
    argv: Sequence[str] = ()  # command line, for the run record

    @property
    def smaller_is_better(self) -> bool:
        """Whether smaller values of the metric are better."""
        return SMALLER_IS_BETTER[self.metric]

    def arguments(self, values: Values, folder: Path) -> list[str]:
        """Return the arguments of ``simpo train`` for a trial."""
        fixed = [argument for key, values in self.fixed.items() for argument in (f"--{key}", *values)]
        varied = [f"--{key}={value}" for key, value in values.items()]
        recipe = [] if self.recipe is None else [str(self.recipe)]
        return [*recipe, *fixed, *varied, f"--output_dir={folder}"]

    def identity(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that determines the result, given the recipe's keys."""
        keys = {key: str(value) for key, value in recipe.items() if key != "output_dir"}
        keys |= {key: " ".join(values) for key, values in self.fixed.items()}
        keys |= {f"axis {axis.key}": str(axis) for axis in self.axes}
        search = {"metric": self.metric, "sampler": self.sampler, "trials": self.trials, "prune": self.prune}
        return keys | {f"sweep {key}": value for key, value in search.items()}

    def study(self) -> Study:
        """Open the study that holds the trials; the folder must exist."""
        return Study(self.folder, self.axes, self.sampler, self.trials, smaller_is_better=self.smaller_is_better)


def run_sweep(sweep: Sweep, recipe: Mapping[str, Any]) -> Path | None:
    """Run the remaining trials. The process that finishes the last one writes the results and the best recipe.

    The same call resumes a killed sweep and leaves a finished one unchanged. Several processes may run the same sweep
    at once and share its trials. ``recipe`` holds the recipe's keys and values as written. Returns the path of
    ``results.json``, or None if other processes are still running trials.

    Raises:
        SimpoError: the input is invalid, the disk is full, or no trial finished.
        InterruptedRun: a signal arrived; the trial has saved a checkpoint.
    """
    jobs = _check(sweep)
    identity = sweep.identity(recipe) | _contents(sweep, jobs)
    while True:
        with ExitStack() as stack:
            run = _open_folder(sweep, identity, stack)
            log = print if run is None else run.log
            if run is not None and run.finished:
                return sweep.folder / FILE_NAME
            log(f"{sweep.trials} trials ({sweep.sampler}): {'; '.join(map(str, sweep.axes))}")
            study = sweep.study()
            while (trial := study.take()) is not None:
                _run_trial(sweep, study, trial, log)
                free_memory()  # after the exception of a failed trial, which refers to its model, has been dropped
            running = sum(trial.state.name == "RUNNING" for trial in study.trials())
            if running:
                log(
                    f"{running} trials are still running in other processes, the last of which will write the results; "
                    "if one is killed, run the same command again"
                )
                return None
            if run is not None:
                return run.complete(partial(_report, sweep, study, recipe))
        # All trials have ended, but another process holds the folder and is about to write the results.


def _open_folder(sweep: Sweep, identity: Mapping[str, Any], stack: ExitStack) -> RunFolder | None:
    """Open the sweep's folder until ``stack`` exits; return None if another process runs the same sweep in it."""
    try:
        run = stack.enter_context(RunFolder(sweep.folder, command="sweep"))
        run.begin(identity, argv=sweep.argv, recipe=sweep.recipe)
    except FolderInUseError as error:
        try:
            differences = RunRecord.read(sweep.folder).differences(identity)
        except FileNotFoundError:
            raise error from None
        if differences:
            raise SimpoError(
                f"output_dir: {sweep.folder} is in use by a sweep with other settings ({'; '.join(differences)}); "
                "name a new folder"
            ) from None
        return None
    return run


def _check(sweep: Sweep) -> list[TrainingJob]:
    """Parse and return the job of every grid trial (for TPE, of the axes' ends) before anything is written."""
    jobs = []
    for values in combinations(sweep.axes) if sweep.sampler == "grid" else one_at_a_time(sweep.axes):
        job = sweep.read(sweep.arguments(values, sweep.folder))
        data = job.data
        if not (data.eval_dataset_name or data.dataset_test_split or data.dataset_mixer or data.dataset_mixture):
            raise SimpoError("eval_dataset_name: name held-out pairs to compare the trials on")
        judged = any(getattr(callback, "settings", {}).get("eval_judge") for callback in job.callbacks)
        if sweep.metric == WIN_RATE and not judged:
            raise SimpoError(f"--metric: {WIN_RATE} needs judged answers; set eval_generations and eval_judge")
        if sweep.prune and job.config.eval_strategy == "no":
            raise SimpoError("--prune: needs evaluations during training; set eval_strategy: steps and eval_steps")
        jobs.append(job)
    return jobs


def _contents(sweep: Sweep, jobs: Sequence[TrainingJob]) -> dict[str, str]:
    """Return digests of the data and the initial models, which must not change when a killed sweep is resumed."""
    package, level = logging.getLogger("simpo"), logging.getLogger("simpo").level
    package.setLevel(logging.ERROR)  # the first trial logs the same notices
    try:
        distinct = {repr(job.data): job for job in jobs}  # the data may be an axis
        prepared = [prepare_data(PreferenceTrainer, job)[2] for job in distinct.values()]
        if not (sweep.folder / RECORD).exists():
            check_model_files(jobs[0].model)
    finally:
        package.setLevel(level)
    models = {job.model.model_name_or_path: job.model for job in jobs}
    digests: dict[str, str] = {}
    for number, parts in enumerate(prepared):
        place = f"data {number}" if number else "data"
        digests |= {f"{place}/{label}": rows_digest(part.dataset) for label, part in parts.items()}
    return digests | {f"model {name}": model_digest(model) for name, model in models.items()}


# ---- One trial.


class _TrialCallback(RunCallback):
    """Checks before training that the sweep's metric exists, and reports evaluations to ``trial`` if given."""

    def __init__(self, metric: str, trial: Any | None) -> None:
        self._metric, self._trial = metric, trial

    def check_trainer(self, trainer: Trainer) -> None:
        """Raise :class:`SimpoError` if the trial's evaluations will not have the metric."""
        if trainer.eval_dataset is None:
            raise SimpoError("eval_dataset_name: name held-out pairs to compare the trials on")
        check_measured("--metric", self._metric, trainer)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Report the evaluation; raises Optuna's ``TrialPruned`` if it is worse than the median at this step."""
        if self._trial is not None:
            self._trial.report(metrics[self._metric], state.global_step)
            if self._trial.should_prune():
                raise load_optuna().TrialPruned(f"after step {state.global_step}")


def _run_trial(sweep: Sweep, study: Study, trial: Any, log: Log) -> None:
    """Run one trial and record its outcome; if this process is interrupted, the trial stays open."""
    values, folder = values_of(trial), study.folder_of(trial)
    name = f"trial {trial.number} ({_format(values)})"
    try:
        for other in study.trials():  # TPE may draw the same values again
            if is_finished(other) and values_of(other) == values:
                log(f"{name}: same values as trial {other.number}")
                study.end(trial, other.value, same_as=other.number)
                return
        log(f"{name} in {folder}")
        job = sweep.read(sweep.arguments(values, folder))
        callback = _TrialCallback(sweep.metric, trial if sweep.prune else None)
        with track_part(f"{sweep.folder.name}-{folder.name}", folder) as trackers:
            callbacks = [*job.callbacks, callback, trackers]
            run_training(PreferenceTrainer, dataclasses.replace(job, callbacks=callbacks))
        value = read_metric(folder, sweep.metric).value
        if value is None:
            raise SimpoError(f"{sweep.metric} is not a finite number")
        study.end(trial, value)
        log(f"{name}: {sweep.metric} {value:.4g}")
    except study.optuna.TrialPruned as stop:
        study.end(trial, None, "PRUNED")
        log(f"{name}: pruned {stop}")
    except (torch.OutOfMemoryError, SimpoError) as error:
        # Errors from the disk, the hub or a file have a cause, and the next trial would fail the same way. If the
        # trial's inputs have changed since it started, it can continue once they are restored.
        if isinstance(error, DifferentRunError):
            raise
        if isinstance(error, SimpoError) and (error.__cause__ is not None or not (folder / RECORD).exists()):
            raise
        reason = str(error) if isinstance(error, SimpoError) else f"out of memory: {' '.join(str(error).split())[:200]}"
        study.end(trial, None, "FAIL", reason=reason)
        log(f"{name}: failed: {reason}")
    finally:
        study.release(trial)


def _format(values: Values) -> str:
    """Format values as in ``learning_rate 3e-7, beta 2``."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def read_metric(folder: Path, name: str) -> Metric:
    """Return a metric of a finished trial."""
    if name != WIN_RATE:
        metrics = read_results(folder / FILE_NAME).metrics
        return next(metric for metric in metrics if (metric.name, metric.stage) == (name, "after"))
    values = [line[name] for line in read_lines(folder / "metrics.jsonl") if name in line]
    if not values:
        raise SimpoError(f"--metric: there were no evaluations in {folder}; lower eval_steps")
    return Metric(name, values[-1])


# ---- The results.


def is_finished(trial: Any) -> bool:
    """Whether an Optuna trial was trained to the end; a trial that repeats another's values was not trained."""
    return trial.state.name == "COMPLETE" and "same_as" not in trial.user_attrs


def rank(trials: Sequence[Any], *, smaller_is_better: bool) -> list[Any]:
    """Return the finished trials, best first and ties by number; trials that repeat another's values are left out."""
    finished = [trial for trial in trials if is_finished(trial)]
    if not finished:
        failed = (trial for trial in trials if "reason" in trial.user_attrs)
        reason = next((f"; trial {trial.number}: {trial.user_attrs['reason']}" for trial in failed), "")
        raise SimpoError(f"none of the {len(trials)} trials finished{reason}")
    sign = 1 if smaller_is_better else -1
    return sorted(finished, key=lambda trial: (sign * trial.value, trial.number))


def _report(sweep: Sweep, study: Study, recipe: Mapping[str, Any]) -> list[Metric]:
    """Write the best recipe, and return the sweep's metrics: counts by outcome, the best trial, and all trials."""
    trials = study.trials()
    ranked = rank(trials, smaller_is_better=sweep.smaller_is_better)
    metrics = [dataclasses.replace(read_metric(study.folder_of(trial), sweep.metric), stage=None) for trial in ranked]
    _write_best(sweep, ranked[0], metrics[0], recipe)
    states = [trial.state.name for trial in trials]
    return [
        Metric("trials/finished", len(ranked)),
        *(Metric(f"trials/{name}", states.count(state)) for state, name in _UNFINISHED.items()),
        Metric("best/trial", ranked[0].number),
        dataclasses.replace(metrics[0], name=f"best/{sweep.metric}"),
        *(
            dataclasses.replace(metric, name=f"trials/{trial.number:03d}/{sweep.metric}")
            for trial, metric in zip(ranked, metrics, strict=True)
        ),
    ]


def _write_best(sweep: Sweep, best: Any, metric: Metric, recipe: Mapping[str, Any]) -> None:
    """Write the recipe with the best trial's values, without output folder and secrets."""
    keys: dict[str, Any] = {key: value for key, value in recipe.items() if key != "output_dir"}
    for key, texts in sweep.fixed.items():
        values = [yaml.safe_load(text) for text in texts]
        keys[key] = values if len(values) > 1 else (values[0] if values else True)
    keys |= {key: yaml.safe_load(value) for key, value in values_of(best).items()}
    path = sweep.folder / BEST
    text = yaml.safe_dump(redact(keys), sort_keys=False, allow_unicode=True, width=120)
    head = f"# Trial {best.number} of a sweep, best by {metric.name}: {metric.text} ({_format(values_of(best))}).\n"
    write_text(path, f"{head}# simpo train {path} --output_dir DIR\n\n{text}")


def print_sweep(sweep: Sweep) -> Path:
    """Print the table of a finished sweep, and return the folder of its best trial, which holds the model."""
    study = sweep.study()
    trials = study.trials()
    print_table(sweep.folder, trials, sweep.axes, sweep.metric)
    return study.folder_of(rank(trials, smaller_is_better=sweep.smaller_is_better)[0])


def print_table(
    folder: Path, trials: Sequence[Any], axes: Sequence[Axis], metric: str, console: Console | None = None
) -> None:
    """Print all trials with their metrics from ``folder/results.json``, best first, and remarks on the ranking."""
    by_name = {f"trials/{trial.number:03d}/{metric}": trial for trial in trials}
    metrics = read_results(folder / FILE_NAME).metrics  # in ranking order
    ranked = [(by_name[one.name], one) for one in metrics if one.name in by_name]
    rows = [(trial, one.text) for trial, one in ranked]
    rows += [(trial, _UNFINISHED[trial.state.name]) for trial in trials if trial.state.name in _UNFINISHED]
    headings = ("trial", *(axis.key for axis in axes), metric.removeprefix("eval_"))
    lines = [
        (str(trial.number), *(values_of(trial).get(axis.key, "") for axis in axes), outcome) for trial, outcome in rows
    ]
    console = console or Console()
    print_full_width(console, make_table(headings, lines, names=0, title="simpo sweep"))
    notes = [*_remarks(ranked, axes)]
    notes += [f"trial {one.number} failed: {one.user_attrs['reason']}" for one in trials if "reason" in one.user_attrs]
    if repeated := ", ".join(str(trial.number) for trial in trials if "same_as" in trial.user_attrs):
        notes.append(f"trials with the values of an earlier one, not run again: {repeated}")
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def _remarks(ranked: Sequence[tuple[Any, Metric]], axes: Sequence[Axis]) -> Iterator[str]:
    """Yield remarks on how certain the ranking is, and on where to search further."""
    best, metric = ranked[0]

    def may_be_equal(other: Metric) -> bool:
        """Whether a trial's value equals the best one or lies within its interval."""
        if metric.low is None or metric.high is None or other.value is None:
            return other.value == metric.value
        return other.value == metric.value or metric.low <= other.value <= metric.high

    close = sum(may_be_equal(other) for _, other in ranked[1:])
    if close and metric.low is not None:
        yield (
            f"{close} of the other {len(ranked) - 1} finished trials lie within the best one's interval; with "
            f"{metric.n} pairs, such differences may be due to chance"
        )
    for axis in axes:
        value = values_of(best)[axis.key]
        elsewhere = [other for trial, other in ranked if values_of(trial)[axis.key] != value]
        if (end := axis.end(value)) is not None and not any(map(may_be_equal, elsewhere)):
            direction = "larger" if end == "largest" else "smaller"
            yield f"{axis.key}: the best value, {value}, is the {end} tried; try {direction} ones, too"
