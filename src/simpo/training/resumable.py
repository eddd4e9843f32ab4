"""A ``Trainer`` whose logs and checkpoints are exact across a resume, however a run was stopped."""

from __future__ import annotations

import json
import logging
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from simpo.atomic import write_text
from simpo.errors import SimpoError
from simpo.training.adapters import flatten_named
from simpo.training.checkpoints import (
    BestCheckpoint,
    SaveAfterEpoch,
    check_checkpoint,
    last_good_checkpoint,
    ranks_of,
    rotate,
    staged_checkpoint,
    step_of,
)
from simpo.training.running_means import RunningMeans
from simpo.training.sharded import ShardedTrainer
from simpo.training.sharding import reshard

logger = logging.getLogger(__name__)

_MEANS_NAME = "running_means.json"


class ResumableTrainer(ShardedTrainer):
    """Logs means over rows, and writes checkpoints that are whole or absent.

    Overrides of ``Trainer``: what is logged (``log``), where training starts (``train``), and how a checkpoint is
    written (``_save_checkpoint``: staged, listed, renamed, rotated). Subclasses add their rows' figures to ``_means``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._means = RunningMeans(self.metric_names, self.args.device)
        self._staging: Path | None = None
        self._saved: int | None = None  # the step whose checkpoint this training has written or read
        # Kept from Trainer, whose rotation knows no staging and whose last one may remove the newest checkpoint.
        self._save_total_limit: int | None = None
        self.add_callback(BestCheckpoint())
        self.add_callback(SaveAfterEpoch())

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Names of a row's figures, the loss first."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the rows' means since the last log, over all ranks, into the training log."""
        if "loss" in logs:
            logs |= self._means.take(self._sum_over_ranks)
        if "train_loss" in logs:
            logs |= {"train_loss": self._means.overall(self._sum_over_ranks).get("loss", math.nan)}
        super().log(logs, start_time)

    def mean_loss(self) -> float:
        """Over the whole training, also the part before a resume."""
        return self._means.overall(self._sum_over_ranks).get("loss", math.nan)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            flatten_named(self.model, Path(output_dir or self.args.output_dir))
        settings = getattr(self.model, "generation_config", None)
        if isinstance(self.model, PeftModel) and settings and self.args.should_save:  # peft leaves them to the base
            settings.save_pretrained(output_dir or self.args.output_dir)
        # a pickle, and it holds the hub token; the recipe says the same
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint`` is a checkpoint, or True for the newest whole one in the output folder."""
        checkpoint = self._starting_point(resume_from_checkpoint)
        self._saved = None
        if checkpoint is not None:
            self._restore(checkpoint)
        reshard(self.model)  # an evaluation may have left it gathered, and an optimizer takes its parameters
        self._save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)
        finally:
            self.args.save_total_limit = self._save_total_limit

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As Trainer's, but tied weights are stored once, and the second is not missing."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _starting_point(self, asked: str | bool | None) -> Path | None:
        folder = Path(self.args.output_dir)
        if asked and asked is not True:
            return Path(asked)
        found = last_good_checkpoint(folder) if asked or self.args.save_strategy != "no" else None
        if asked and found is None:
            raise SimpoError(f"resume_from_checkpoint: there is no whole checkpoint in {folder}")
        if found is not None and not asked:
            raise SimpoError(
                f"output_dir: {folder} holds checkpoints of another training; continue it with "
                "resume_from_checkpoint=True, or name a new folder"
            )
        return found

    def _restore(self, checkpoint: Path) -> None:
        """What ``Trainer`` does not restore, after a look at what it will."""
        check_checkpoint(checkpoint, self.model)
        if checkpoint.resolve().parent == Path(self.args.output_dir).resolve():
            self._saved = step_of(checkpoint)
        self._means.restore(json.loads((checkpoint / _MEANS_NAME).read_text()), main=self.is_world_process_zero())
        saved_by = ranks_of(checkpoint)
        self.check_engine(checkpoint, saved_by)
        if saved_by not in (0, self.args.world_size) and self.is_world_process_zero():
            logger.warning(
                "%s is of %d processes and continues on %d: exactly, but for random numbers (dropout)",
                *(checkpoint, saved_by, self.args.world_size),
            )

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any) -> Any:
        """As ``Trainer``'s, which takes one more step after the last one of a run that ends within an epoch."""
        started = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        if self.state.global_step > max_steps:
            raise SimpoError(
                f"resume_from_checkpoint: {checkpoint} is of step {self.state.global_step}, beyond the last step "
                f"({max_steps}) of this training; raise max_steps or num_train_epochs, or name an earlier checkpoint"
            )
        return (epochs, 0) if self.state.global_step == max_steps else started

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint next to its final place, list its files with sizes and hashes, and only then rename it."""
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        main = self.is_world_process_zero()
        means = self._means.state(self._sum_over_ranks)  # every rank is here now, and sees the same folder
        if self._saved == self.state.global_step:
            return  # an epoch's end may come by a step that has just been saved
        with staged_checkpoint(final, main=main, wait=self.accelerator.wait_for_everyone) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_model_checkpoint == str(staging / final.name):
                self.state.best_model_checkpoint = str(final)
            if main:
                self._complete(staging / final.name, means)
        self._saved = self.state.global_step
        if main:
            rotate(folder, self._save_total_limit, newest=final, best=self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the model is to be saved with ``save_strategy: best``: also where training ends or is stopped."""
        return super()._determine_best_metric(metrics, trial) or self.control.should_training_stop

    def _complete(self, staged: Path, means: dict[str, Any]) -> None:
        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # again: the best one's name is the final one
        write_text(staged / _MEANS_NAME, json.dumps(means))
