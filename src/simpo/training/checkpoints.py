"""Checkpoints that are whole or absent: staged, listed with sizes and hashes, renamed, and verified before use."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from simpo.atomic import disk_errors, provisional, remove_folder, staged_folder
from simpo.errors import SimpoError
from simpo.runs.manifest import damage, write_manifest

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first, whole or not."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    return [path for _, path in sorted(((int(m[1]), path) for m, path in found if m), reverse=True)]


def last_good_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of ``folder``; damaged ones before it are named in a warning."""
    for path in checkpoints(folder):
        fault = damage(path)
        if fault is None:
            return path
        logger.warning("%s is damaged (%s) and is skipped", path, fault)
    return None


def check_checkpoint(path: Path, model: nn.Module) -> None:
    """Raise :class:`SimpoError` unless ``path`` is a whole checkpoint of a model with ``model``'s weights."""
    if not path.is_dir():
        raise SimpoError(f"resume_from_checkpoint: there is no folder {path}")
    if fault := damage(path):
        raise SimpoError(f"resume_from_checkpoint: {path} is damaged ({fault}); name another checkpoint")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in _stored_shapes(path):
        if shapes.get(name) != shape:
            here = f"{list(shapes[name])} here" if name in shapes else "not in this one"
            raise SimpoError(
                f"resume_from_checkpoint: {path} is of another model ({name} is {list(shape)} there, {here}); "
                "name a checkpoint of this model"
            )


def _stored_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            yield from ((name, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118


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


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove all but the ``limit`` newest checkpoints; the newest and the best always stay."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(folder)
    kept = {found[0], *([Path(best)] if best else [])}
    for path in found[1:]:
        if len(kept) < limit:
            kept.add(path)
    for path in found:
        if path not in kept:
            remove_folder(path)
