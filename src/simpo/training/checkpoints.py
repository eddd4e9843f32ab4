"""Exact resume: atomic checkpoints, running means that carry over, and signals that save before stopping."""

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
from simpo.training.settings import checkpoint_from_recipe
from simpo.training.sharding import ShardedTrainer, reshard, stored_tensors

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_MEANS_NAME = "running_means.json"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in ``folder``, newest first, including damaged ones."""
    paths = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _NAME.fullmatch(path.name))
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the optimizer step in the name of a checkpoint folder."""
    return int(path.name.rpartition("-")[2])


def last_good_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint in ``folder``, or None; warn about each damaged one it skips."""
    for path in checkpoints(folder):
        fault = find_damage(path)
        if fault is None:
            return path
        logger.warning("%s is damaged (%s); skipping it", path, fault)
    return None


def check_complete(path: Path) -> None:
    """Raise :class:`SimpoError` unless ``path`` is a checkpoint with no missing or modified files."""
    if not path.is_dir():
        raise SimpoError(f"resume_from_checkpoint: there is no folder {path}")
    if not (path / _MEANS_NAME).is_file() and (inside := checkpoints(path)):
        raise SimpoError(f"resume_from_checkpoint: {path} is a run folder; use a checkpoint in it, such as {inside[0]}")
    if fault := find_damage(path):
        raise SimpoError(f"resume_from_checkpoint: {path} is damaged ({fault}); use another checkpoint")


def check_best(path: Path) -> None:
    """Raise :class:`SimpoError` unless ``path``, the best checkpoint so far, is undamaged."""
    if fault := find_damage(path) if path.is_dir() else "missing":
        raise SimpoError(
            f"load_best_model_at_end: {path}, the best checkpoint so far, is damaged ({fault}); restore it, use "
            "resume_from_checkpoint with a checkpoint from before it in a new folder, or delete the run folder to "
            "start over"
        )


def check_checkpoint(path: Path, model: nn.Module) -> None:
    """Raise :class:`SimpoError` unless ``path`` is an undamaged checkpoint of a model like ``model``."""
    check_complete(path)
    _check_same_model(path, model)


def _check_same_model(path: Path, model: nn.Module) -> None:
    if fault := _mismatch(path, model):
        raise SimpoError(
            f"resume_from_checkpoint: {path} belongs to another model ({fault}); use a checkpoint of this model"
        )


def _mismatch(path: Path, model: nn.Module) -> str | None:
    """Describe how ``model`` differs from the checkpoint's model, or return None; names are checked on loading."""
    if isinstance(model, PeftModel):
        if not has_adapter_weights(path):
            return "the checkpoint is a full model, this run trains an adapter"
        return adapter_fault(model, read_adapter_tensors(str(path)))
    if has_adapter_weights(path):
        return "the checkpoint is an adapter, this run trains a full model"
    config, expected = path / "config.json", getattr(getattr(model, "config", None), "model_type", None)
    saved = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if saved not in (None, expected):
        return f"the checkpoint is a {saved} model, this run's is {expected}"
    shapes = {name: shape_of(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, stored in stored_tensors(path):
        shape = tuple(stored.get_shape())
        if shapes.get(name, shape) != shape:
            return f"{name} is {list(shape)} in the checkpoint, {list(shapes[name])} in this run"
    return None


@contextmanager
def staged_checkpoint(final: Path, *, main: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """Yield a staging folder in which all ranks write a subfolder named like ``final``; rename it once complete.

    An existing ``final``, which a resumed run has reached again, is replaced. The ``main`` rank creates and renames
    folders; the others only write into them. ``wait`` is a barrier across ranks.
    """
    if main and final.exists():
        remove_folder(final)
    with shared_staging(staged_folder(final), provisional(final), main=main, wait=wait) as partial:
        yield partial
        wait()  # other ranks may still be writing their random states
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
    """Enter ``staged`` on the main rank and yield its folder on all ranks, where ``name`` is that folder's path."""
    with staged if main else nullcontext(name) as folder, disk_errors(name):
        wait()
        yield folder
        wait()


def rotate(folder: Path, limit: int | None, *, newest: Path, best: str | None) -> None:
    """Delete all but ``limit`` checkpoints, keeping the newest, the best, and then the latest ones before the newest.

    Checkpoints of later steps, left over when a run went back to an earlier checkpoint, are deleted first.
    """
    if limit is None or limit <= 0:
        return
    keep = {newest.name} | ({Path(best).name} if best else set())
    before = [path.name for path in checkpoints(folder) if step_of(path) < step_of(newest)]
    keep |= set([name for name in before if name not in keep][: max(0, limit - len(keep))])
    for path in checkpoints(folder):
        if path.name not in keep:
            remove_folder(path)


@contextmanager
def _stored_state(checkpoint: str | None) -> Iterator[None]:
    """Reject files that training did not save, without torch's advice to load them unsafely."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            yield
    except (SimpoError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise SimpoError(
            f"resume_from_checkpoint: cannot load the optimizer, schedule or random state in {checkpoint}; use another "
            "checkpoint"
        ) from error


class ResumableTrainer(ShardedTrainer):
    """A ``Trainer`` whose logs and checkpoints are exact across a resume, however the run was stopped.

    Overrides ``log`` (what is logged), ``train`` (where training starts) and ``_save_checkpoint`` (checkpoints are
    staged, hashed, renamed and rotated). Subclasses add the metrics of rows to ``_means`` and any other averaged
    values to ``_other_means``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._means = RunningMeans(self.metric_names, self.args.device)
        self._other_means: dict[str, RunningMeans] = {}  # means of values that are not metrics of rows
        self._tokens = 0  # trained on this rank; after a resume, the main rank also holds the total up to then
        self._staging: Path | None = None
        self._saved: int | None = None  # step of the last checkpoint written or resumed from
        self._best_before: Path | None = None  # the best checkpoint from before a resume
        # Hidden from Trainer, whose rotation does not know about staging and may delete the newest checkpoint.
        self._save_total_limit: int | None = None
        self.add_callback(SaveAfterEpoch())

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics of a row, the loss first."""

    @property
    def evaluated_names(self) -> tuple[str, ...]:
        """Names of the metrics that held-out rows have."""
        return self.metric_names

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log, over all ranks, to the training log."""
        for means in (self._means, *self._other_means.values()) if "loss" in logs else ():
            logs |= means.take(self._sum_over_ranks)
        if "train_loss" in logs:
            logs |= {"train_loss": self.mean_loss()}
        super().log(logs, start_time)

    def mean_loss(self) -> float:
        """Return the mean loss over the whole training, including the part before a resume."""
        return self._means.overall(self._sum_over_ranks).get("loss", math.nan)

    def trained_tokens(self) -> int:
        """Return the number of tokens trained on, counting a shared prompt once. Every rank must call this."""
        return int(self._sum_over_ranks(torch.tensor(self._tokens, device=self.args.device)))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, optionally from a checkpoint folder or, given True, the newest undamaged one in the output folder."""
        checkpoint = self._starting_point(resume_from_checkpoint)
        self._saved = None
        if checkpoint is not None:
            self._restore(checkpoint)
        reshard(self.model)  # an evaluation may have left it gathered, and the optimizer needs the sharded parameters
        self._save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)
        finally:
            self.args.save_total_limit = self._save_total_limit

    def _starting_point(self, requested: str | bool | None) -> Path | None:
        folder = Path(self.args.output_dir)
        if requested and requested is not True:
            return Path(requested)
        checkpoint = last_good_checkpoint(folder) if requested or self.args.save_strategy != "no" else None
        if requested and checkpoint is None:
            raise SimpoError(f"resume_from_checkpoint: there is no undamaged checkpoint in {folder}")
        if checkpoint is not None and not requested:
            raise SimpoError(
                f"output_dir: {folder} already holds checkpoints; continue from them with resume_from_checkpoint=True, "
                "or name a new folder"
            )
        return checkpoint

    def check_start(self, checkpoint: Path) -> None:
        """Raise :class:`SimpoError` if training cannot start from the undamaged ``checkpoint``; writes nothing.

        ``train`` checks the same, and also compares the step with a last step that depends on the number of rows.
        """
        _check_same_model(checkpoint, self.model)
        with third_party(f"resume_from_checkpoint: {checkpoint}: {TRAINER_STATE_NAME}"):
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            step, recorded = int(state.global_step), state.best_model_checkpoint
        self._check_step(checkpoint, step, self.args.max_steps if self.args.max_steps > 0 else step)
        self._find_best(checkpoint, recorded)
        with _stored_state(str(checkpoint)):
            self.check_optimizer_state(checkpoint)

    def _check_step(self, checkpoint: Path | str | None, step: int, last: int) -> None:
        if step > last:
            raise SimpoError(
                f"resume_from_checkpoint: {checkpoint} was saved at step {step}, past the last step of this training "
                f"({last}); raise max_steps or num_train_epochs, or use an earlier checkpoint"
            )

    def _restore(self, checkpoint: Path) -> None:
        """Check the checkpoint and restore the state that ``Trainer`` does not."""
        check_checkpoint(checkpoint, self.model)
        with third_party(f"resume_from_checkpoint: {checkpoint}: {TRAINER_STATE_NAME} or {_MEANS_NAME}"):
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            counts = (state.global_step, state.train_batch_size)
            if not all(isinstance(count, int) for count in counts) or not isinstance(state.log_history, list):
                raise TypeError("not a trainer state")
            means = json.loads((checkpoint / _MEANS_NAME).read_text(encoding="utf-8"))
            self._means.restore(means, main=self.is_world_process_zero())
            for name in self._other_means.keys() & means.keys():
                self._other_means[name].restore(means[name], main=self.is_world_process_zero())
            self._tokens = int(means.get("tokens", 0)) if self.is_world_process_zero() else 0
        self._best_before = self._find_best(checkpoint, state.best_model_checkpoint)
        if checkpoint.resolve().parent == Path(self.args.output_dir).resolve():
            self._saved = step_of(checkpoint)
            newest = checkpoints(Path(self.args.output_dir))[0].name == checkpoint.name
            if newest and self.is_world_process_zero():  # a killed run may not have deleted the old ones yet
                best = state.best_model_checkpoint
                rotate(Path(self.args.output_dir), self.args.save_total_limit, newest=checkpoint, best=best)
        saved_by = len(list(checkpoint.glob("rng_state*.pth")))  # every process saves its random state
        self.check_engine(checkpoint, saved_by)
        if saved_by not in (0, self.args.world_size) and self.is_world_process_zero():
            logger.warning(
                "%s was saved by %d processes and continues on %d; only random numbers (dropout) will differ",
                *(checkpoint, saved_by, self.args.world_size),
            )

    def _find_best(self, checkpoint: Path, recorded: str | None) -> Path | None:
        """Return the best checkpoint recorded in ``checkpoint``, or None; if it will be loaded, check it.

        It is next to ``checkpoint``, or next to the checkpoint that this run started from, if it is from before the
        start. The recorded folder does not count, because it is another run's if the run folder was copied.
        """
        if recorded is None:
            return None
        start = checkpoint_from_recipe(self.args)
        folders = [checkpoint.parent, *([] if start is None else [Path(start).parent])]
        places = [folder / Path(recorded).name for folder in folders]
        best = next((place for place in places if place.is_dir()), places[0])
        if self.args.load_best_model_at_end and best != checkpoint:
            check_best(best)
        return best if best.is_dir() else None

    def _load_best_model(self) -> None:
        check_best(Path(str(self.state.best_model_checkpoint)))  # it may have been damaged since it was written
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _stored_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _stored_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any) -> Any:
        """Keep ``Trainer`` from taking one step too many when resuming from the last step of a run ending mid-epoch."""
        started = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        self._check_step(checkpoint, self.state.global_step, max_steps)
        if checkpoint is not None:
            self.state.compute_steps(self.args, max_steps)  # this run's logging_steps, eval_steps and save_steps
            best = self._best_before  # the recorded folder may have been moved or copied since
            self.state.best_model_checkpoint = None if best is None else str(best)
        return (epochs, 0) if self.state.global_step == max_steps else started

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to a staging folder, record its files' sizes and hashes, and only then rename it."""
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        main = self.is_world_process_zero()
        means = self._means.state(self._sum_over_ranks) | {"tokens": self.trained_tokens()}
        means |= {name: other.state(self._sum_over_ranks) for name, other in self._other_means.items()}
        # The reductions above synchronized the ranks, so all of them see the same folder.
        if self._saved == self.state.global_step:
            return  # the last step of an epoch may already have been saved
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
        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # again, now with the best checkpoint's final name
        write_text(staged / _MEANS_NAME, json.dumps(means))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            move_named_adapter(self.model, folder)
            settings = getattr(self.model, "generation_config", None)
            if settings:  # peft saves them only with the base model
                settings.save_pretrained(folder)
        # This pickle contains the hub token; the recipe already records the settings.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether ``save_strategy: best`` saves now: also when training ends or is stopped."""
        return super()._determine_best_metric(metrics, trial) or self.control.should_training_stop


# ---- When to save: after everything else at the end of an epoch, and after a signal.


def ends_epoch(state: TrainerState) -> bool:
    """Return whether the step just taken is the last of its epoch or of the run."""
    return (state.epoch or 0.0) % 1 == 0 or state.global_step >= state.max_steps


class SaveAfterEpoch(TrainerCallback):
    """Saves the last step of an epoch or run only after everything else due at that point.

    A run resumed from that checkpoint has nothing left to do for the epoch: no evaluation is lost or repeated.
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
    """Saves a checkpoint and stops after the step during which SIGINT or SIGTERM arrives; a second one stops at once.

    Used as a context manager around ``trainer.train()``; on exit it raises :class:`InterruptedRun` after a signal.
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
                f"stopped by {name}; saved at step {self.step}; run the same command to continue",
                self._received[0] if self._received else signal.SIGTERM,
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stopped = bool(self._received)
        if args.world_size > 1:  # a signal to any process stops all of them
            stopped = bool(reduce(torch.tensor(float(stopped), device=args.device), "sum"))
        if stopped:
            self.step = state.global_step
            control.should_training_stop = True
            control.should_save = not ends_epoch(state)  # at the end of an epoch, on_epoch_end saves

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.step is None:
            return
        if ends_epoch(state):
            control.should_save = True
        else:  # an interrupted epoch is not evaluated as if it had ended
            control.should_log = control.should_evaluate = control.should_save = False
