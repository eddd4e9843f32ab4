"""Checkpoints that are whole or absent: staged, listed with sizes and hashes, renamed, and verified before use."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from simpo.atomic import disk_errors, provisional, remove_folder, staged_folder
from simpo.errors import SimpoError
from simpo.runs.manifest import damage, write_manifest
from simpo.training.adapters import adapter_fault, holds_adapter
from simpo.training.renamed import kind_of
from simpo.training.sharding import stored_tensors
from simpo.training.zero import shape_of

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
