"""Helpers for tests of training runs: record gradients, and kill a run after a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor
from transformers import TrainerCallback

from simpo.training.packed import PackedTrainer


class GradientRecorder(TrainerCallback):
    """Records copies of the gradients just before each optimizer step.

    Attributes:
        steps: gradients by parameter name, one dictionary per step.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Called by the trainer."""
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Killed(BaseException):
    """Stands in for a killed process."""


@contextmanager
def killed_after_step(step: int) -> Iterator[None]:
    """Kill the training run in the body once it has taken ``step`` optimizer steps."""
    training_step = PackedTrainer.training_step

    def die_after_step(self, *args):
        if self.state.global_step == step:
            raise Killed
        return training_step(self, *args)

    with pytest.MonkeyPatch.context() as patches, pytest.raises(Killed):
        patches.setattr(PackedTrainer, "training_step", die_after_step)
        yield
