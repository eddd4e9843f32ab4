"""Exact resume: staged and verified checkpoints, resumable logs, and signals that save before they stop."""

from __future__ import annotations

import json
import logging
import math
import re
import signal
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from simpo.errors import InterruptedRun, SimpoError
from simpo.models.adapters import adapter_fault, flatten_named, holds_adapter
from simpo.models.zero import shape_of
from simpo.runs.atomic import disk_errors, provisional, remove_folder, staged_folder, write_text
from simpo.runs.manifest import damage, write_manifest
from simpo.runs.signals import noted
from simpo.training.batches import RunningMeans
from simpo.training.sharded import ShardedTrainer
from simpo.training.sharding import kind_of, reshard, stored_tensors

logger = logging.getLogger(__name__)


_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first, whole or not."""
    found = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _NAME.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint's folder."""
    return int(path.name.rpartition("-")[2])


def last_good_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of ``folder``; damaged ones before it are named in a warning."""
    for path in checkpoints(folder):
        fault = damage(path)
        if fault is None:
            return path
        logger.warning("%s is damaged (%s) and is skipped", path, fault)
    return None


def check_whole(path: Path) -> None:
    """Raise :class:`SimpoError` unless ``path`` is a checkpoint of which nothing is missing or changed."""
    if not path.is_dir():
        raise SimpoError(f"resume_from_checkpoint: there is no folder {path}")
    if fault := damage(path):
        raise SimpoError(f"resume_from_checkpoint: {path} is damaged ({fault}); name another checkpoint")


def check_checkpoint(path: Path, model: nn.Module) -> None:
    """Raise :class:`SimpoError` unless ``path`` is a whole checkpoint of a model with ``model``'s weights."""
    check_whole(path)
    if isinstance(model, PeftModel):
        if fault := adapter_fault(model, path):
            raise SimpoError(_another_model(path, fault))
        return
    if holds_adapter(path):
        raise SimpoError(_another_model(path, "an adapter there, a whole model here"))
    here = getattr(getattr(model, "config", None), "model_type", None)
    if (kind := kind_of(path)) not in (None, here):
        raise SimpoError(_another_model(path, f"{kind} there, {here} here"))
    shapes = {name: shape_of(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, stored in stored_tensors(path):  # names that are not the model's are looked at when they are loaded
        shape = tuple(stored.get_shape())
        if shapes.get(name, shape) != shape:
            raise SimpoError(_another_model(path, f"{name} is {list(shape)} there, {list(shapes[name])} here"))


def _another_model(path: Path, how: str) -> str:
    return f"resume_from_checkpoint: {path} is of another model ({how}); name a checkpoint of this model"


def ranks_of(path: Path) -> int:
    """How many processes saved the checkpoint ``path``: each keeps its random state."""
    return len(list(path.glob("rng_state*.pth")))


@contextmanager
def staged_checkpoint(final: Path, *, main: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """A folder in which all ranks write a checkpoint as a folder named like ``final``; it becomes ``final`` when whole.

    Args:
        final: the checkpoint's place; what is there (a damaged one that this run has come by again) is replaced.
        main: whether this rank makes and renames folders; the others write into them.
        wait: returns when every rank has called it.

    Raises:
        SimpoError: the disk is full or the folder cannot be written; no other checkpoint is touched.
    """
    if main and final.exists():
        remove_folder(final)
    with shared_staging(staged_folder(final), provisional(final), main=main, wait=wait) as partial:
        yield partial
        wait()  # the other processes may still be writing their random states
        if main:
            written = partial / final.name
            for path in written.iterdir():
                path.rename(partial / path.name)
            written.rmdir()
            write_manifest(partial)


@contextmanager
def shared_staging(
    staged: AbstractContextManager[Path], name: Path, *, main: bool, wait: Callable[[], None]
) -> Iterator[Path]:
    """``staged`` as the main rank enters it, and for the other ranks the folder ``name`` that it yields there."""
    with staged if main else nullcontext(name) as folder, disk_errors(name):
        wait()
        yield folder
        wait()


def rotate(folder: Path, limit: int | None, *, newest: Path, best: str | None) -> None:
    """Remove all but ``limit`` checkpoints: the one just written, the best, and of the others the latest before it.

    Those of later steps, which a run that went back has left behind, go first.
    """
    if limit is None or limit <= 0:
        return
    kept = {newest.name} | ({Path(best).name} if best else set())
    before = [path.name for path in checkpoints(folder) if step_of(path) < step_of(newest)]
    kept |= set([name for name in before if name not in kept][: max(0, limit - len(kept))])
    for path in checkpoints(folder):
        if path.name not in kept:
            remove_folder(path)


class SaveAfterEpoch(TrainerCallback):
    """Writes the checkpoint of an epoch's last step, or the run's, after everything else that is due there.

    A run that continues from it has then nothing left to do for that epoch: no evaluation is lost or repeated.
    """

    def __init__(self) -> None:
        self._due = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Postpone the checkpoint of an epoch's last step."""
        self._due = control.should_save and ends_epoch(state)
        control.should_save = control.should_save and not self._due

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for the checkpoint that was postponed."""
        control.should_save = control.should_save or self._due
        self._due = False


def ends_epoch(state: TrainerState) -> bool:
    """Whether the step just taken is the last one of an epoch or of the run, which may end within an epoch."""
    return (state.epoch or 0.0) % 1 == 0 or state.global_step >= state.max_steps


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint of a run that is continued again, also where its folder has moved."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for it by its step, where the checkpoints are now."""
        if state.best_global_step:
            path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if path.is_dir():
                state.best_model_checkpoint = str(path)


# ---- A ``Trainer`` whose logs and checkpoints are exact across a resume, however a run was stopped.


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


# ---- SIGTERM and SIGINT during training: finish the step, save, stop.


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after the step in which a signal came; a second signal ends it at once.

    Used as a context manager around ``trainer.train()``; on leaving it raises :class:`InterruptedRun` if a signal came.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._received: list[int] = []
        self._handlers = ExitStack()

    @property
    def signum(self) -> int:
        """The signal that this process received; 0 for none."""
        return self._received[0] if self._received else 0

    def __enter__(self) -> StopOnSignal:
        self._received = self._handlers.enter_context(noted(signal.SIGINT, signal.SIGTERM))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()
        if error is None and self.step is not None:
            name = signal.Signals(self.signum).name if self.signum else "a signal to another process"
            raise InterruptedRun(
                f"stopped by {name}; saved at step {self.step}: the same command continues",
                self.signum or signal.SIGTERM,
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end if any rank was signalled."""
        if self._any_rank():
            self.step = state.global_step
            control.should_training_stop = True
            control.should_save = not ends_epoch(state)  # else after what is due at the epoch's end

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save after an epoch that has ended; keep one that was broken off from being evaluated as if it had."""
        if self.step is None:
            return
        if ends_epoch(state):
            control.should_save = True
        else:
            control.should_log = control.should_evaluate = control.should_save = False

    def _any_rank(self) -> bool:
        if not (dist.is_available() and dist.is_initialized()):
            return bool(self.signum)
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        flag = torch.tensor(self.signum, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
