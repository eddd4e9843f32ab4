"""Callbacks for a whole run: the base class, log lines, ``metrics.jsonl``, and experiment trackers."""

# ruff: noqa: D102 - TrainerCallback documents the events

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from simpo.config.fields import nearest
from simpo.errors import SimpoError, one_line
from simpo.runs.files import JsonLines, json_safe, read_lines
from simpo.runs.log import Log
from simpo.runs.results import FILE_NAME, read_results
from simpo.runs.terminal import duration

logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """A ``TrainerCallback`` that takes part in the whole run, not just the training loop.

    :func:`~simpo.training.run.run_training` calls :meth:`prepare`, :meth:`check_trainer` and :meth:`before_training`
    in this order, and the trainer calls :meth:`evaluate`, all on every rank. A callback must not change weights,
    training mode or random state, so that a run is bit-identical with and without it. A
    :class:`~simpo.errors.SimpoError` raised by any of these methods ends the run.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """The callback's recipe keys and their values, which become part of the run's identity."""
        return {}

    def prepare(
        self,
        config: TrainingArguments,
        processing: Any,
        held_out: Dataset | None,
        log: Log,
    ) -> None:
        """Check everything that can be checked before weights are loaded and anything is written.

        Args:
            config: the training configuration.
            processing: the model's tokenizer or, for rows with images, its processor.
            held_out: the held-out rows as read, before tokenization; None if there are none.
            log: prints a line for the user and adds it to the run's log.
        """

    def check_trainer(self, trainer: Trainer) -> None:
        """Check the trainer, which holds the initial model, before anything is written."""

    def before_training(self, trainer: Trainer, *, resumed: bool) -> None:
        """Measure the initial model, before a checkpoint is loaded and before the first step.

        Args:
            trainer: holds the initial model.
            resumed: whether files the callback wrote in an earlier start of the same run are still valid.
        """

    def evaluate(self, trainer: Trainer) -> Mapping[str, float]:
        """Return metrics to add to an evaluation during training; they are logged with the prefix ``eval_``."""
        return {}

    @property
    def metric_names(self) -> Sequence[str]:
        """The names of the metrics that :meth:`evaluate` returns, known after :meth:`prepare`."""
        return ()


# What Trainer adds to the metrics of an evaluation.
_EVALUATION_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def check_measured(key: str, metric: str, trainer: Trainer) -> None:
    """Raise :class:`SimpoError` unless the trainer's evaluations have ``metric``, which the setting ``key`` names.

    As in transformers, the prefix ``eval_`` may be missing. The trainer's callbacks must have been prepared.
    """
    callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, RunCallback)]
    measured = [*trainer.evaluated_names, *(name for callback in callbacks for name in callback.metric_names)]
    known = [f"eval_{name}" for name in measured]
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    if name not in (*known, *_EVALUATION_TIMES):
        raise SimpoError(
            f"{key}: {metric} is not measured on these rows; choose from {', '.join(known)}{nearest(name, known)}"
        )


class CheckpointShare(TrainerCallback):
    """Keeps activation checkpointing on for only a share of the layers, spread evenly.

    The other layers store their activations instead of recomputing them in the backward pass, so no more compute is
    traded for memory than necessary.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        # Trainer has enabled it for all layers.
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer, chosen in zip(layers, checkpointed_layers(len(layers), self._share), strict=True):
            layer.gradient_checkpointing = layer.gradient_checkpointing and chosen


def checkpointed_layers(count: int, share: float) -> list[bool]:
    """Choose a ``share`` of ``count`` layers, spread evenly: True for each chosen layer."""
    return [int((number + 1) * share) > int(number * share) for number in range(count)]


# ---- Logs for the user and for ``metrics.jsonl``.

# Suffixes of the timings Trainer logs for an evaluation or for the whole training.
_TIMES = ("_runtime", "_per_second", "_preparation_time", "total_flos")


def log_as_lines(trainer: Trainer, log: Log) -> None:
    """Print a trainer's logs as lines instead of dictionaries, above the progress bar if there is one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_ProgressBar)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLines(log))


class _ProgressBar(ProgressCallback):
    """The progress bar without its own log lines; :class:`LogLines` prints those."""

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        pass


class LogLines(TrainerCallback):
    """Prints every log of the trainer as one line, with an estimate of the time left."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._began, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in logs.items()
            if key != "epoch" and not key.endswith(_TIMES)
        )
        if not (state.is_world_process_zero and shown):
            return
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        seconds = (time.monotonic() - self._began) / max(done, 1) * left
        time_left = f", about {duration(seconds)} left" if done and left else ""
        with tqdm.external_write_mode():  # hides any progress bar while the line is printed
            self._log(f"step {state.global_step:,} of {state.max_steps:,}{time_left}: {shown}")


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to ``metrics.jsonl``, after the logs of the checkpoint it resumes from.

    Args:
        lines: the file.
        from_this_run: whether the checkpoint belongs to this run, so that its logs should already be in the file.
    """

    def __init__(self, lines: JsonLines, *, from_this_run: bool) -> None:
        self._lines, self._from_this_run = lines, from_this_run

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        history = [json_safe({"step": None, "epoch": None, **logs}) for logs in state.log_history]
        if list(islice(self._lines, len(history))) != history:
            if self._from_this_run:
                logger.warning("%s: lines were missing or damaged; restored from the checkpoint", self._lines.path)
            self._lines.keep(0)
            self._lines.append(history)
        # Anything logged after the checkpoint will be logged again.
        self._lines.keep(len(history))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        self._lines.append([{"step": state.global_step, "epoch": state.epoch, **logs}])


# ---- The outcome of a finished run for trackers: results, a table of sampled answers, the report as an artifact.


ANSWERS = "answers"
_MAX_ANSWERS = 100  # rows of the table
_KINDS = (TensorBoardCallback, WandbCallback, MLflowCallback, TrackioCallback)


class Trackers(RunCallback):
    """Sends the outcome of a run to the trackers that have its curves.

    Transformers' callbacks send the curves and close their trackers when training ends. Held-out rows are scored and
    the report is written later, so each tracker is reopened. Trackers without tables or artifacts get text.
    """

    def __init__(self, part: str | None = None) -> None:
        """Track a run, or a ``part`` of a larger one whose name is added to the run name and TensorBoard folder."""
        self._part = part
        self._callbacks: Sequence[Any] = ()  # stays empty if training had already finished and is not run again
        self._args: Any = None
        self._step = 0
        self._trackio_run: str | None = None

    def check_trainer(self, trainer: Trainer) -> None:
        if self._part is None or not trainer.args.report_to:
            return
        name = trainer.args.run_name
        trainer.args.run_name = self._part if name is None else f"{name}-{self._part}"
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is not None:
                callback.logging_dir = str(Path(callback.logging_dir) / self._part)

    def before_training(self, trainer: Trainer, *, resumed: bool) -> None:
        self._args = trainer.args
        if trainer.is_world_process_zero():  # keep only trackers: other callbacks may keep the model in memory
            self._callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, _KINDS)]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        for callback in self._callbacks:
            if isinstance(callback, TrackioCallback):  # trackio names a run that has no name
                self._trackio_run = callback._trackio.context_vars.current_run.get().name

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        self._step = state.global_step

    def publish(self, folder: Path, report: Path | None) -> None:
        """Send the outcome of the finished run in ``folder``; if a tracker fails, only warn.

        Args:
            folder: the run folder; nothing is sent if the run had already finished before this start.
            report: the run's report, if it could be written.
        """
        senders: dict[type, Any] = {
            TensorBoardCallback: self._to_tensorboard,
            WandbCallback: self._to_wandb,
            MLflowCallback: self._to_mlflow,
            TrackioCallback: self._to_trackio,
        }
        for callback in self._callbacks:
            kind = next(kind for kind in _KINDS if isinstance(callback, kind))
            try:
                senders[kind](callback, _Outcome.read(folder, report))
            except Exception as error:
                logger.warning(
                    "%s did not accept the results of the run (%s: %s); they are in %s",
                    *(kind.__name__.removesuffix("Callback"), type(error).__name__, one_line(error), folder),
                )

    def close(self) -> None:
        """Close runs the trackers leave open: W&B would add the next part's curves to the same run."""
        for callback in self._callbacks:
            if isinstance(callback, WandbCallback) and callback._wandb.run is not None:
                callback._wandb.finish()

    def _to_tensorboard(self, callback: Any, outcome: _Outcome) -> None:
        settings = {
            key: value for key, value in self._args.to_sanitized_dict().items() if isinstance(value, int | float | str)
        }
        with callback._SummaryWriter(log_dir=callback.logging_dir) as writer:
            writer.add_hparams(settings, outcome.metrics, run_name=".", global_step=self._step)  # also adds scalars
            if outcome.answers:
                writer.add_text(ANSWERS, outcome.markdown(), self._step)
            writer.add_text("files", "\n\n".join(f"`{path}`" for path in outcome.files), self._step)

    def _to_wandb(self, callback: Any, outcome: _Outcome) -> None:
        wandb = callback._wandb
        wandb.run.summary.update(outcome.metrics)
        if outcome.answers:
            table = wandb.Table(columns=list(outcome.columns), data=outcome.answers)
            wandb.run.log({ANSWERS: table, "train/global_step": self._step})
        artifact = wandb.Artifact(f"report-{wandb.run.id}", type="report")
        for path in outcome.files:
            artifact.add_file(str(path))
        wandb.run.log_artifact(artifact)

    def _to_mlflow(self, callback: Any, outcome: _Outcome) -> None:
        mlflow, now = callback._ml_flow, int(time.time() * 1000)
        client, run = mlflow.MlflowClient(), mlflow.last_active_run().info.run_id
        metrics = [mlflow.entities.Metric(*metric, now, self._step) for metric in outcome.metrics.items()]
        client.log_batch(run, metrics=metrics)
        if outcome.answers:
            cells = zip(*outcome.answers, strict=True)
            client.log_table(run, dict(zip(outcome.columns, map(list, cells), strict=True)), f"{ANSWERS}.json")
        for path in outcome.files:
            client.log_artifact(run, str(path))

    def _to_trackio(self, callback: Any, outcome: _Outcome) -> None:
        trackio, args = callback._trackio, self._args
        trackio.init(project=args.project, name=self._trackio_run, space_id=args.trackio_space_id, resume="must")
        table = {ANSWERS: trackio.Table(columns=list(outcome.columns), data=outcome.answers)} if outcome.answers else {}
        trackio.log({**outcome.metrics, **table})
        for path in outcome.files:
            trackio.log_artifact(path, name=path.name, type="report")
        trackio.finish()


@contextmanager
def track_part(name: str, folder: Path) -> Iterator[Trackers]:
    """Track part of a larger run, such as one trial of a sweep, as a separate run.

    Args:
        name: the name of the part.
        folder: the folder whose results are published if the body ends without an error.
    """
    trackers = Trackers(name)
    try:
        yield trackers
        trackers.publish(folder, None)
    finally:
        trackers.close()


@dataclass(frozen=True)
class _Outcome:
    """The outcome of a finished run: metrics by name, a table of answers, and the files to upload."""

    metrics: Mapping[str, float]
    columns: Sequence[str]
    answers: list[list[Any]]
    files: Sequence[Path]

    @classmethod
    def read(cls, folder: Path, report: Path | None) -> _Outcome:
        metrics = {
            "/".join(filter(None, ("results", metric.stage, metric.name))): metric.value
            for metric in read_results(folder / FILE_NAME).metrics
            if metric.value is not None
        }
        columns, answers = _answers(folder)
        if len(answers) > _MAX_ANSWERS:
            logger.warning("trackers get only the first %d of %d answers", _MAX_ANSWERS, len(answers))
        files = [folder / FILE_NAME] if report is None else [folder / FILE_NAME, report]
        return cls(metrics, columns, answers[:_MAX_ANSWERS], files)

    def markdown(self) -> str:
        """Format the answers as a Markdown table."""
        lines = [self.columns, ["---"] * len(self.columns), *self.answers]
        cells = [["<br>".join(str(cell).replace("|", "\\|").splitlines()) for cell in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _answers(folder: Path) -> tuple[Sequence[str], list[list[Any]]]:
    """Return columns and rows: answers before and after training, or those of the last rollout with their scores."""
    steps = sorted((folder / "generations").glob("step-*.jsonl"), key=lambda path: int(path.stem[5:]))
    if steps:
        pairs = zip(read_lines(folder / "generations/start.jsonl"), read_lines(steps[-1]), strict=True)
        rows = [[_text(row["prompt"]), row["responses"][0], later["responses"][0]] for row, later in pairs]
        return ("prompt", "before", "after"), rows
    rollouts = sorted((folder / "rollouts").glob("0*.jsonl"))[-1:]
    rows = [
        [_text(row["prompt"]), response, score]
        for path in rollouts
        for row in read_lines(path)
        for response, score in zip(row["responses"], row["scores"], strict=True)
    ]
    return ("prompt", "answer", "score"), rows


def _text(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn.get('content')}" for turn in prompt)
