"""What looks on while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.training.packed import PackedTrainer
from simpo.training.settings import TrainingSettings


class Observer(Protocol):
    """Adds figures to a training's evaluations and leaves weights and random numbers as they are."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its keys of the recipe, which are part of the run's identity."""
        ...

    def prepare(
        self,
        config: TrainingSettings,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset | None,
        say: Callable[[str], None],
    ) -> None:
        """Everything that can fail before weights are read and anything is written; all ranks call.

        Args:
            config: of the training.
            tokenizer: of the model.
            rows: the held-out rows as they were read; None if there are none.
            say: gets lines for the user.

        Raises:
            SimpoError: it cannot look on at this training.
        """
        ...

    def begin(self, trainer: PackedTrainer, *, again: bool) -> None:
        """See the start model, and join the trainer's evaluations, before the first step; all ranks call.

        Args:
            trainer: with the start model.
            again: whether the run folder may hold what was found at an earlier start of the same run.

        Raises:
            SimpoError: the start model's figures cannot be had.
        """
        ...
