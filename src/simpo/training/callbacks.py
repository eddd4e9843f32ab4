"""Callbacks of a run: the interface for what takes part in one, its log lines and ``metrics.jsonl``, and trackers."""

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

from simpo.errors import one_line
from simpo.runs.files import JsonLines, json_safe, read_lines
from simpo.runs.log import Log
from simpo.runs.results import FILE_NAME, read_results
from simpo.runs.terminal import duration

logger = logging.getLogger(__name__)


class RunCallback(TrainerCallback):
    """A ``TrainerCallback`` with a part in a whole run, not only in its training loop.

    :func:`~simpo.training.run.run_training` calls :meth:`prepare`, :meth:`check_trainer` and :meth:`before_training`
    in this order, and the trainer calls :meth:`evaluate`; all on every rank. A callback leaves weights, training mode
    and random state as they are, so that a run has the same bits without it. A :class:`~simpo.errors.SimpoError`
    raised by any of these methods ends the run.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """The callback's recipe keys with their values, which become part of the run's identity."""
        return {}

    def prepare(
        self,
        config: TrainingArguments,
        processing: Any,
        held_out: Dataset | None,
        log: Log,
    ) -> None:
        """Check everything that can be checked before weights are read and anything is written.

        Args:
            config: the configuration of the training.
            processing: the model's tokenizer or, for rows with images, its processor.
            held_out: the held-out rows as they were read, before tokenization; None if there are none.
            log: prints a line for the user and keeps it in the run's log.
        """

    def check_trainer(self, trainer: Trainer) -> None:
        """Check the trainer, which has the start model, before anything is written."""

    def before_training(self, trainer: Trainer, *, resumed: bool) -> None:
        """Examine the start model, before a checkpoint is loaded and before the first step.

        Args:
            trainer: with the start model.
            resumed: whether files that the callback wrote at an earlier start of the same run are still valid.
        """

    def evaluate(self, trainer: Trainer) -> Mapping[str, float]:
        """Metrics to add to an evaluation during training; they are logged with the prefix ``eval_``."""
        return {}


class CheckpointShare(TrainerCallback):
    """Keeps ``activation_checkpointing`` on for a share of the layers, spread evenly.

    A layer without it keeps its activations, and its forward is not computed again in backward: memory is exchanged for
    arithmetic only as far as it is needed.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        # Trainer has switched it on for all layers.
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer, chosen in zip(layers, checkpointed_layers(len(layers), self._share), strict=True):
            layer.gradient_checkpointing = layer.gradient_checkpointing and chosen


def checkpointed_layers(count: int, share: float) -> list[bool]:
    """Whether each of ``count`` layers is chosen, so that the ``share`` of chosen ones is spread evenly."""
    return [int((number + 1) * share) > int(number * share) for number in range(count)]


# ---- How a run's logs reach the user and ``metrics.jsonl``.

# Suffixes of what Trainer logs about the duration of an evaluation or of the whole training.
_TIMES = ("_runtime", "_per_second", "_preparation_time", "total_flos")


def log_as_lines(trainer: Trainer, log: Log) -> None:
    """Report a trainer's logs as lines instead of dictionaries, above its progress bar if it has one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_ProgressBar)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLines(log))


class _ProgressBar(ProgressCallback):
    """The progress bar without its log lines, which :class:`LogLines` writes."""

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        pass


class LogLines(TrainerCallback):
    """Reports every log of the trainer as one line, with an estimate of the time left."""

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
        with tqdm.external_write_mode():  # removes a progress bar from the terminal while the line is written
            self._log(f"step {state.global_step:,} of {state.max_steps:,}{time_left}: {shown}")


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to ``metrics.jsonl``, which begins with those of a resumed checkpoint.

    Args:
        lines: the file.
        own: whether a checkpoint is of this run, so that its logs should be in the file.
    """

    def __init__(self, lines: JsonLines, *, own: bool) -> None:
        self._lines, self._own = lines, own

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        history = [json_safe({"step": None, "epoch": None, **logs}) for logs in state.log_history]
        if list(islice(self._lines, len(history))) != history:
            if self._own:
                logger.warning(
                    "%s: lines were missing or damaged and are those of the checkpoint again", self._lines.path
                )
            self._lines.keep(0)
            self._lines.append(history)
        # What was logged after the checkpoint will be logged again.
        self._lines.keep(len(history))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        self._lines.append([{"step": state.global_step, "epoch": state.epoch, **logs}])


# ---- Trackers get the outcome of a run at its end: results, sampled answers as a table, the report as an artifact.


ANSWERS = "answers"
_MOST_ANSWERS = 100  # rows of the table
_KINDS = (TensorBoardCallback, WandbCallback, MLflowCallback, TrackioCallback)


class Trackers(RunCallback):
    """Sends the outcome of a run to the trackers that have its curves.

    Transformers' callbacks send curves, and close their trackers at the end of training. Held-out rows are scored and
    the report is written later, so each tracker is opened again. Trackers without a table or artifacts get text.
    """

    def __init__(self, part: str | None = None) -> None:
        """Track a run, or the ``part`` of a larger one, which is appended to its name and to TensorBoard's folder."""
        self._part = part
        self._callbacks: Sequence[Any] = ()  # none for a training that is not run, because it had finished before
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
        if trainer.is_world_process_zero():  # no other callbacks, which may keep the model in memory
            self._callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, _KINDS)]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        for callback in self._callbacks:
            if isinstance(callback, TrackioCallback):  # it chooses the name of a run that has none
                self._trackio_run = callback._trackio.context_vars.current_run.get().name

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        self._step = state.global_step

    def publish(self, folder: Path, report: Path | None) -> None:
        """Send the outcome of the finished run in ``folder``; a tracker that fails does not undo the run.

        Args:
            folder: of the run; nothing is sent for a run that had finished before.
            report: the page that explains it, if it could be written.
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
                    "%s did not accept the outcome of the run (%s: %s); it is in %s",
                    *(kind.__name__.removesuffix("Callback"), type(error).__name__, one_line(error), folder),
                )

    def close(self) -> None:
        """End the runs that trackers leave open: W&B would add the next part's curves to the same run."""
        for callback in self._callbacks:
            if isinstance(callback, WandbCallback) and callback._wandb.run is not None:
                callback._wandb.finish()

    def _to_tensorboard(self, callback: Any, outcome: _Outcome) -> None:
        settings = {
            key: value for key, value in self._args.to_sanitized_dict().items() if isinstance(value, int | float | str)
        }
        with callback._SummaryWriter(log_dir=callback.logging_dir) as writer:
            writer.add_hparams(settings, outcome.figures, run_name=".", global_step=self._step)  # and the scalars
            if outcome.answers:
                writer.add_text(ANSWERS, outcome.markdown(), self._step)
            writer.add_text("files", "\n\n".join(f"`{path}`" for path in outcome.files), self._step)

    def _to_wandb(self, callback: Any, outcome: _Outcome) -> None:
        wandb = callback._wandb
        wandb.run.summary.update(outcome.figures)
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
        metrics = [mlflow.entities.Metric(*figure, now, self._step) for figure in outcome.figures.items()]
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
        trackio.log({**outcome.figures, **table})
        for path in outcome.files:
            trackio.log_artifact(path, name=path.name, type="report")
        trackio.finish()


@contextmanager
def track_part(name: str, folder: Path) -> Iterator[Trackers]:
    """Track a part of a larger run, such as a trial of a sweep, as a run of its own.

    Args:
        name: the name of the part.
        folder: the folder whose results are published when the body has ended without an error.
    """
    trackers = Trackers(name)
    try:
        yield trackers
        trackers.publish(folder, None)
    finally:
        trackers.close()


@dataclass(frozen=True)
class _Outcome:
    """A finished run: its results by name, a table of answers with its columns, and its report and results."""

    figures: Mapping[str, float]
    columns: Sequence[str]
    answers: list[list[Any]]
    files: Sequence[Path]

    @classmethod
    def read(cls, folder: Path, report: Path | None) -> _Outcome:
        figures = {
            "/".join(filter(None, ("results", metric.stage, metric.name))): metric.value
            for metric in read_results(folder / FILE_NAME).metrics
            if metric.value is not None
        }
        columns, answers = _answers(folder)
        if len(answers) > _MOST_ANSWERS:
            logger.warning("trackers get the first %d of %d answers", _MOST_ANSWERS, len(answers))
        files = [folder / FILE_NAME] if report is None else [folder / FILE_NAME, report]
        return cls(figures, columns, answers[:_MOST_ANSWERS], files)

    def markdown(self) -> str:
        """The table of answers."""
        lines = [self.columns, ["---"] * len(self.columns), *self.answers]
        cells = [["<br>".join(str(cell).replace("|", "\\|").splitlines()) for cell in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _answers(folder: Path) -> tuple[Sequence[str], list[list[Any]]]:
    """Columns and rows: answers before and after (eval_generations), or those of the last rollout with their scores."""
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
