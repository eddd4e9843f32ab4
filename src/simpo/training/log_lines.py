"""What training logs, a line each, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from simpo.progress import duration

# Of an evaluation or of the whole training: how long it took, in four ways.
_TIMES = ("_runtime", "_per_second", "_preparation_time", "total_flos")


def log_in_lines(trainer: Any, say: Callable[[str], None]) -> None:
    """Report a trainer's logs as lines, below which its progress bar stays if it has one, in place of dictionaries."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Bar)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLines(say))


class _Bar(ProgressCallback):
    """The progress bar alone."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The line is written by :class:`LogLines`."""


class LogLines(TrainerCallback):
    """Says every log of the trainer."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._begun = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        self._begun, self._first_step = time.monotonic(), state.global_step

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """Say one log."""
        figures = {key: value for key, value in logs.items() if key != "epoch" and not key.endswith(_TIMES)}
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in figures.items())
        if state.is_world_process_zero and shown:
            with tqdm.external_write_mode():  # clears a bar for as long as the line is written
                self._say(f"step {state.global_step:,} of {state.max_steps:,}{self._left(state)}: {shown}")

    def _left(self, state: TrainerState) -> str:
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        return f", about {duration((time.monotonic() - self._begun) / done * left)} left" if done and left else ""


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
