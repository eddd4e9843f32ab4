"""Exact resume: checkpoints that are whole or absent, means that continue, and signals that save before they stop."""

# ruff: noqa: D102 - TrainerCallback documents the events

from __future__ import annotations

import json
import logging
import math
import re
import signal
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from simpo.errors import InterruptedRun, SimpoError, third_party
from simpo.models.adapters import adapter_fault, has_adapter_weights, move_named_adapter, read_adapter_tensors
from simpo.models.zero import shape_of
from simpo.runs.files import disk_errors, provisional, remove_folder, staged_folder, write_text
from simpo.runs.manifest import find_damage, write_manifest
from simpo.runs.terminal import record_signals
from simpo.training.metrics import RunningMeans
from simpo.training.sharding import ShardedTrainer, reshard, stored_tensors

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_MEANS_NAME = "running_means.json"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first, whole or not."""
    found = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _NAME.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint's folder."""
    return int(path.name.rpartition("-")[2])


def last_good_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``; a warning names each newer one that is damaged."""
    for path in checkpoints(folder):
        fault = find_damage(path)
        if fault is None:
            return path
        logger.warning("%s is damaged (%s) and is skipped", path, fault)
    return None


def check_complete(path: Path) -> None:
    """Raise :class:`SimpoError` unless ``path`` is a checkpoint in which nothing is missing or changed."""
    if not path.is_dir():
        raise SimpoError(f"resume_from_checkpoint: there is no folder {path}")
    if fault := find_damage(path):
        raise SimpoError(f"resume_from_checkpoint: {path} is damaged ({fault}); name another checkpoint")


def check_checkpoint(path: Path, model: nn.Module) -> None:
    """Raise :class:`SimpoError` unless ``path`` is a whole checkpoint of a model with ``model``'s weights."""
    check_complete(path)
    if fault := _difference(path, model):
        raise SimpoError(
            f"resume_from_checkpoint: {path} belongs to another model ({fault}); name a checkpoint of this model"
        )


def _difference(path: Path, model: nn.Module) -> str | None:
    """The difference from the checkpoint's model, as text; weights with other names are checked when loaded."""
    if isinstance(model, PeftModel):
        if not has_adapter_weights(path):
            return "a whole model there, an adapter here"
        return adapter_fault(model, read_adapter_tensors(str(path)))
    if has_adapter_weights(path):
        return "an adapter there, a whole model here"
    config, here = path / "config.json", getattr(getattr(model, "config", None), "model_type", None)
    there = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if there not in (None, here):
        return f"{there} there, {here} here"
    shapes = {name: shape_of(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, stored in stored_tensors(path):
        shape = tuple(stored.get_shape())
        if shapes.get(name, shape) != shape:
            return f"{name} is {list(shape)} there, {list(shapes[name])} here"
    return None


@contextmanager
def staged_checkpoint(final: Path, *, main: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """A folder in which all ranks write a checkpoint as a folder named like ``final``; it becomes ``final`` when whole.

    A damaged checkpoint at ``final``, which this run has reached again, is replaced. The ``main`` rank makes and
    renames folders; the others write into them. ``wait`` returns when every rank has called it.
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
    """``staged`` as the main rank enters it, and for the other ranks the folder ``name`` that it makes there."""
    with staged if main else nullcontext(name) as folder, disk_errors(name):
        wait()
        yield folder
        wait()


def rotate(folder: Path, limit: int | None, *, newest: Path, best: str | None) -> None:
    """Remove all but ``limit`` checkpoints: the one just written, the best, and the latest before it are kept.

    Those of later steps, which a run that went back to an earlier checkpoint has left, go first.
    """
    if limit is None or limit <= 0:
        return
    kept = {newest.name} | ({Path(best).name} if best else set())
    before = [path.name for path in checkpoints(folder) if step_of(path) < step_of(newest)]
    kept |= set([name for name in before if name not in kept][: max(0, limit - len(kept))])
    for path in checkpoints(folder):
        if path.name not in kept:
            remove_folder(path)


@contextmanager
def _stored_state(checkpoint: str | None) -> Iterator[None]:
    """Refuse pickles that are not what a training saved, without torch's advice to load them unsafely."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            yield
    except (SimpoError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise SimpoError(
            f"resume_from_checkpoint: {checkpoint}: its optimizer, schedule or random state is not what a training "
            "saved; name another checkpoint"
        ) from error


class ResumableTrainer(ShardedTrainer):
    """A ``Trainer`` whose logs and checkpoints are exact across a resume, however a run was stopped.

    Overrides of ``Trainer``: what is logged (``log``), where training starts (``train``), and how a checkpoint is
    written (``_save_checkpoint``: staged, listed, renamed, rotated). Subclasses add their rows' metrics to ``_means``,
    and what else is logged as a mean to ``_other_means``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._means = RunningMeans(self.metric_names, self.args.device)
        self._other_means: dict[str, RunningMeans] = {}  # of other values than rows' metrics
        self._tokens = 0  # that this rank has trained on; after a resume the main rank's include those of all ranks
        self._staging: Path | None = None
        self._saved: int | None = None  # the step whose checkpoint this training has written or read
        # Hidden from Trainer, whose rotation does not know about staging and may remove the newest checkpoint.
        self._save_total_limit: int | None = None
        self.add_callback(SaveAfterEpoch())

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Names of a row's metrics, the loss first."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the means since the last log, over all ranks, into the training log."""
        for means in (self._means, *self._other_means.values()) if "loss" in logs else ():
            logs |= means.take(self._sum_over_ranks)
        if "train_loss" in logs:
            logs |= {"train_loss": self.mean_loss()}
        super().log(logs, start_time)

    def mean_loss(self) -> float:
        """The mean over the whole training, including the part before a resume."""
        return self._means.overall(self._sum_over_ranks).get("loss", math.nan)

    def trained_tokens(self) -> int:
        """Tokens of all forwards of training, a shared prompt counted once; all ranks call."""
        return int(self._sum_over_ranks(torch.tensor(self._tokens, device=self.args.device)))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

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

    def _starting_point(self, requested: str | bool | None) -> Path | None:
        folder = Path(self.args.output_dir)
        if requested and requested is not True:
            return Path(requested)
        found = last_good_checkpoint(folder) if requested or self.args.save_strategy != "no" else None
        if requested and found is None:
            raise SimpoError(f"resume_from_checkpoint: there is no whole checkpoint in {folder}")
        if found is not None and not requested:
            raise SimpoError(
                f"output_dir: {folder} holds checkpoints of another training; continue it with "
                "resume_from_checkpoint=True, or name a new folder"
            )
        return found

    def _restore(self, checkpoint: Path) -> None:
        """Check the checkpoint, and restore what ``Trainer`` does not."""
        check_checkpoint(checkpoint, self.model)
        with third_party(f"resume_from_checkpoint: {checkpoint}: {TRAINER_STATE_NAME} or {_MEANS_NAME}"):
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if not isinstance(state.global_step, int) or not isinstance(state.log_history, list):
                raise TypeError("no state of a training")
            means = json.loads((checkpoint / _MEANS_NAME).read_text(encoding="utf-8"))
            self._means.restore(means, main=self.is_world_process_zero())
            for name in self._other_means.keys() & means.keys():
                self._other_means[name].restore(means[name], main=self.is_world_process_zero())
            self._tokens = int(means.get("tokens", 0)) if self.is_world_process_zero() else 0
        if checkpoint.resolve().parent == Path(self.args.output_dir).resolve():
            self._saved = step_of(checkpoint)
            newest = checkpoints(Path(self.args.output_dir))[0].name == checkpoint.name
            if newest and self.is_world_process_zero():  # a run that was killed may not have removed the others yet
                best = state.best_model_checkpoint
                rotate(Path(self.args.output_dir), self.args.save_total_limit, newest=checkpoint, best=best)
        saved_by = len(list(checkpoint.glob("rng_state*.pth")))  # every process saves its random state
        self.check_engine(checkpoint, saved_by)
        if saved_by not in (0, self.args.world_size) and self.is_world_process_zero():
            logger.warning(
                "%s was saved by %d processes and continues on %d: exactly, except for random numbers (dropout)",
                *(checkpoint, saved_by, self.args.world_size),
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _stored_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _stored_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any) -> Any:
        """As in ``Trainer``, which takes one step too many after the last one of a run that ends within an epoch."""
        started = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        if self.state.global_step > max_steps:
            raise SimpoError(
                f"resume_from_checkpoint: {checkpoint} was saved at step {self.state.global_step}, beyond the last "
                f"step ({max_steps}) of this training; raise max_steps or num_train_epochs, or name an earlier one"
            )
        if self.state.best_global_step:  # the folder may have been moved since
            best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
        return (epochs, 0) if self.state.global_step == max_steps else started

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint next to its final place, list its files with sizes and hashes, and only then rename it."""
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        main = self.is_world_process_zero()
        means = self._means.state(self._sum_over_ranks) | {"tokens": self.trained_tokens()}
        means |= {name: other.state(self._sum_over_ranks) for name, other in self._other_means.items()}
        # now every rank is here and sees the same folder
        if self._saved == self.state.global_step:
            return  # the end of an epoch may follow a step that has just been saved
        with staged_checkpoint(final, main=main, wait=self.accelerator.wait_for_everyone) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            staged = staging / final.name
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
            if main:
                self._complete(staged, means)
        self._saved = self.state.global_step
        if main:
            rotate(folder, self._save_total_limit, newest=final, best=self.state.best_model_checkpoint)

    def _complete(self, staged: Path, means: dict[str, Any]) -> None:
        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # again, with the final name of the best
        write_text(staged / _MEANS_NAME, json.dumps(means))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            move_named_adapter(self.model, folder)
            settings = getattr(self.model, "generation_config", None)
            if settings:  # peft leaves them to the base model
                settings.save_pretrained(folder)
        # a pickle that holds the hub token; the recipe has the same settings
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether ``save_strategy: best`` saves the model: also where training ends or is stopped."""
        return super()._determine_best_metric(metrics, trial) or self.control.should_training_stop


# ---- When checkpoints are saved: after everything else that is due at an epoch's end, and after a signal.


def ends_epoch(state: TrainerState) -> bool:
    """Whether the step just taken is the last one of an epoch or of the run, which may end within an epoch."""
    return (state.epoch or 0.0) % 1 == 0 or state.global_step >= state.max_steps


class SaveAfterEpoch(TrainerCallback):
    """Writes the checkpoint of an epoch's last step, or the run's, after everything else that is due there.

    A run that continues from it then has nothing left to do for that epoch: no evaluation is lost or repeated.
    """

    def __init__(self) -> None:
        self._due = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._due = control.should_save and ends_epoch(state)
        control.should_save = control.should_save and not self._due

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = control.should_save or self._due
        self._due = False


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after the step in which SIGINT or SIGTERM came; a second signal ends it at once.

    Used as a context manager around ``trainer.train()``; on leaving it raises :class:`InterruptedRun` if a signal came.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._received: list[int] = []
        self._handlers = ExitStack()

    def __enter__(self) -> StopOnSignal:
        self._received = self._handlers.enter_context(record_signals(signal.SIGINT, signal.SIGTERM))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._handlers.close()
        if kind is None and self.step is not None:
            name = signal.Signals(self._received[0]).name if self._received else "a signal to another process"
            raise InterruptedRun(
                f"stopped by {name}; saved at step {self.step}: the same command continues",
                self._received[0] if self._received else signal.SIGTERM,
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stopped = bool(self._received)
        if args.world_size > 1:  # a signal to any process
            stopped = bool(reduce(torch.tensor(float(stopped), device=args.device), "sum"))
        if stopped:
            self.step = state.global_step
            control.should_training_stop = True
            control.should_save = not ends_epoch(state)  # otherwise after what is due at the epoch's end

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.step is None:
            return
        if ends_epoch(state):
            control.should_save = True
        else:  # an epoch that was broken off is not evaluated as if it had ended
            control.should_log = control.should_evaluate = control.should_save = False
