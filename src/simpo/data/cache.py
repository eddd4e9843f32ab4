"""Data sets in the cache of the datasets library: verified before use, and created again if they are damaged."""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from simpo.errors import SimpoError, one_line
from simpo.runs.atomic import write_text
from simpo.runs.manifest import file_digest

logger = logging.getLogger(__name__)

# Exceptions of the library for files that are damaged or cannot be written.
_FAULTS = (OSError, pa.ArrowException, json.JSONDecodeError, DatasetGenerationError)
_temporary: list[Path] = []  # takes the place of a cache that cannot be used, until the process ends


def cached(make: Callable[[], Dataset]) -> Dataset:
    """The data set that ``make`` returns, whose files in the cache are as they were written.

    The library trusts what it finds there. Here every file has a digest next to it, and a file that does not match is
    created again. If the cache cannot be read or written, a temporary one replaces it.

    Raises:
        SimpoError: raised by ``make``.
        OSError, ArrowException, DatasetGenerationError: neither the cache nor a temporary one can be used, or ``make``
            cannot read something else.
    """
    try:
        dataset = make()
        if damaged := [path for path in _files(dataset) if not _is_intact(path)]:
            logger.warning("%s: the cached data was damaged and is created again", damaged[0])
            for path in damaged:
                _remove(path)
            dataset = make()
            if damaged := [path for path in _files(dataset) if not _is_intact(path)]:
                raise OSError(f"{damaged[0]} is damaged and cannot be replaced")
        return dataset
    except _FAULTS as error:
        if isinstance(error.__cause__, SimpoError) or _temporary:
            raise
        before, fault = datasets.config.HF_DATASETS_CACHE, one_line(error.__cause__ or error)
        _temporary.append(Path(tempfile.mkdtemp(prefix="simpo-data-")))
        atexit.register(shutil.rmtree, _temporary[0], ignore_errors=True)
        datasets.config.HF_DATASETS_CACHE = _temporary[0]
        try:
            dataset = make()
        except BaseException:
            datasets.config.HF_DATASETS_CACHE = before
            _temporary.clear()
            raise
        logger.warning("%s: the cache of data sets cannot be used (%s); a temporary one replaces it", before, fault)
        return dataset


def map_cache_file(fingerprint: str) -> str | None:
    """The file for ``Dataset.map`` to write to; None for its default, unless there is a temporary cache."""
    return str(_temporary[0] / f"cache-{fingerprint}.arrow") if _temporary else None


def _files(dataset: Dataset) -> list[Path]:
    """The files of a data set that are in the cache."""
    root = Path(datasets.config.HF_DATASETS_CACHE).resolve()
    return [path for file in dataset.cache_files if root in (path := Path(file["filename"]).resolve()).parents]


def _is_intact(path: Path) -> bool:
    """Whether a file fits its digest, which is written now if there is none."""
    stored, digest = path.with_name(f"{path.name}.sha256"), file_digest(path)
    with suppress(FileNotFoundError):
        return stored.read_text(encoding="utf-8") == digest
    with suppress(OSError, SimpoError):  # a cache that can only be read
        write_text(stored, digest)  # atomic: another process may read it
    return True


def _remove(path: Path) -> None:
    """Remove a file that ``Dataset.map`` wrote, or the folder of a whole data set, which is complete or absent."""
    if path.name.startswith("cache-"):
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
    else:
        shutil.rmtree(path.parent, ignore_errors=True)
