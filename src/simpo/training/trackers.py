"""Trackers get the outcome of a run at its end: results, sampled answers as a table, the report as an artifact."""

# ruff: noqa: D102 - TrainerCallback documents the events

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from simpo.errors import one_line
from simpo.runs.files import read_lines
from simpo.runs.results import FILE_NAME, read_results
from simpo.training.callbacks import RunCallback

logger = logging.getLogger(__name__)

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
