"""Callbacks of a run: the interface for what takes part in one, and its log lines and ``metrics.jsonl``."""

# ruff: noqa: D102 - TrainerCallback documents the events

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from simpo.runs.files import JsonLines, json_safe
from simpo.runs.log import Log
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
