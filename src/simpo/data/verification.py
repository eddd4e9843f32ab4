"""Verifies data that was written earlier or elsewhere before it is used: cache files and tokenized rows."""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from simpo.errors import SimpoError, one_line
from simpo.runs.files import write_text
from simpo.runs.manifest import file_digest

logger = logging.getLogger(__name__)

# What `datasets` raises for files that are damaged or cannot be written.
_CACHE_ERRORS = (OSError, pa.ArrowException, json.JSONDecodeError, DatasetGenerationError)
_temporary_cache: list[Path] = []  # the cache used until the process ends if the normal one is unusable

# Decompressed bytes per byte of a file, in files that expand to more than this many bytes: more is an attack or an
# accident, and would take gigabytes of memory.
_MAX_RATIO, _UNCHECKED_SIZE = 300, 1 << 26


def check_ratio(path: Path, expanded: int) -> None:
    """Raise :class:`SimpoError` if this many decompressed bytes are far more than text can be compressed to."""
    if expanded > max(_UNCHECKED_SIZE, _MAX_RATIO * path.stat().st_size):
        raise SimpoError(
            f"{path}: its rows are over {_MAX_RATIO} times as large as the file; convert it to .jsonl if you trust it"
        )


def cached(make: Callable[[], Dataset]) -> Dataset:
    """Return the dataset that ``make`` returns, after verifying its files in the cache.

    ``datasets`` trusts whatever it finds there. Here every file has a digest next to it, and a file that does not match
    it is created again. If the cache cannot be read or written, a temporary one is used instead.

    Raises:
        SimpoError: raised by ``make``.
        OSError, ArrowException, DatasetGenerationError: neither the cache nor a temporary one can be used, or ``make``
            failed to read some other file.
    """
    try:
        dataset = make()
        if damaged := [path for path in _files(dataset) if not _is_intact(path)]:
            logger.warning("%s: the cached data is damaged; recreating it", damaged[0])
            for path in damaged:
                _remove(path)
            dataset = make()
            if damaged := [path for path in _files(dataset) if not _is_intact(path)]:
                raise OSError(f"{damaged[0]} is damaged and cannot be replaced")
        return dataset
    except _CACHE_ERRORS as error:
        if isinstance(error.__cause__, SimpoError) or _temporary_cache:
            raise
        before, reason = datasets.config.HF_DATASETS_CACHE, one_line(error.__cause__ or error)
        _temporary_cache.append(Path(tempfile.mkdtemp(prefix="simpo-data-")))
        atexit.register(shutil.rmtree, _temporary_cache[0], ignore_errors=True)
        datasets.config.HF_DATASETS_CACHE = _temporary_cache[0]
        try:
            dataset = make()
        except BaseException:
            datasets.config.HF_DATASETS_CACHE = before
            _temporary_cache.clear()
            raise
        logger.warning("%s: the dataset cache cannot be used (%s); using a temporary one instead", before, reason)
        return dataset


def map_cache_file(fingerprint: str) -> str | None:
    """Return the file for ``Dataset.map`` to write to: one in the temporary cache if there is one, else None."""
    return str(_temporary_cache[0] / f"cache-{fingerprint}.arrow") if _temporary_cache else None


def _files(dataset: Dataset) -> list[Path]:
    """Return those files of a dataset that are in the cache."""
    root = Path(datasets.config.HF_DATASETS_CACHE).resolve()
    return [path for file in dataset.cache_files if root in (path := Path(file["filename"]).resolve()).parents]


def _is_intact(path: Path) -> bool:
    """Whether a file matches its digest; if there is none yet, it is written now."""
    stored, digest = path.with_name(f"{path.name}.sha256"), file_digest(path)
    with suppress(FileNotFoundError):
        return stored.read_text(encoding="utf-8") == digest
    with suppress(OSError, SimpoError):  # the cache may be read-only
        write_text(stored, digest)  # atomic: another process may read it
    return True


def _remove(path: Path) -> None:
    """Remove a file written by ``Dataset.map``; for any other file, the whole folder, which datasets needs complete."""
    if path.name.startswith("cache-"):
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
    else:
        shutil.rmtree(path.parent, ignore_errors=True)


# ---- Tokenized rows that may come from elsewhere; checked before anything relies on their structure.

_BATCH = 1000
_MAX_ID = np.iinfo(np.int32).max
# Column -> depth of nested lists, test for the type of the values, and what is expected, in words.
_COLUMNS: dict[str, tuple[int, Callable[[pa.DataType], bool], str]] = {
    "prompt_ids": (1, pa.types.is_integer, "a list of token ids"),
    "response_ids": (2, pa.types.is_integer, "a list of token ids for each response"),
    "scored": (2, pa.types.is_boolean, "a list of true and false for each response"),
    "label": (0, pa.types.is_boolean, "true or false"),
    "where": (0, pa.types.is_string, "text"),
    "extra": (0, pa.types.is_string, "text"),
}


def check_tokenized(rows: Dataset, label: str) -> None:
    """Check the types, ids and lengths of a dataset with ``prompt_ids`` and ``response_ids``.

    Raises:
        SimpoError: a column has the wrong type, or a row has a null, an empty list, an impossible token id, several
            responses but one label, or a number of ``scored`` marks that differs from its tokens; names column and row.
    """
    names = [name for name in _COLUMNS if name in rows.column_names]
    batches = rows.select_columns(names).with_format("arrow").iter(_BATCH)
    for start, batch in zip(count(step=_BATCH), batches, strict=False):
        lengths = {name: _lengths(batch[name], name, f"{label} row", start) for name in names}
        responses, tokens = lengths["response_ids"]
        if "label" in lengths and len(invalid := np.flatnonzero(responses != 1)):
            place = f"{label} row {start + invalid[0]}"
            raise SimpoError(f"{place}: response_ids: a row with a label must have exactly one response")
        if (
            "scored" in lengths
            and (responses == 1).all()
            and any(not np.array_equal(*both) for both in zip(lengths["scored"], (responses, tokens), strict=True))
        ):
            raise SimpoError(f"{label} rows {start} to {start + len(batch) - 1}: scored: not as long as response_ids")


def _lengths(column: Any, name: str, place: str, start: int) -> list[np.ndarray]:
    """Check a column and return the lengths of its lists, level by level."""
    depth, has_type, expected = _COLUMNS[name]
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    row = np.arange(start, start + len(column))  # the row of each value
    lengths: list[np.ndarray] = []

    def reject(mask: Any, reason: str) -> None:
        if len(positions := np.flatnonzero(mask)):
            raise SimpoError(f"{place} {row[positions[0]]}: {name}: {reason}; expected {expected}")

    for _ in range(depth):
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            raise SimpoError(f"{place} {start}: {name}: has type {column.type}; expected {expected}")
        reject(column.is_null(), "null")
        lengths.append(pc.list_value_length(column).to_numpy(zero_copy_only=False))
        reject(lengths[-1] == 0, "an empty list")
        row, column = row[pc.list_parent_indices(column)], pc.list_flatten(column)
    reject(column.is_null(), "null")
    if not has_type(column.type):
        raise SimpoError(f"{place} {start}: {name}: has type {column.type}; expected {expected}")
    if pa.types.is_integer(column.type):
        ids = column.to_numpy(zero_copy_only=False)
        reject((ids < 0) | (ids > _MAX_ID), "not a valid token id")
    return lengths


def check_rankings(rows: Dataset, label: str) -> None:
    """Check that every row is a comparison with ranked responses."""
    counts = pc.list_value_length(rows.with_format("arrow")["response_ids"]).to_pylist()
    scores = rows.with_format("arrow")["scores"].to_pylist() if "scores" in rows.column_names else [None] * len(rows)
    for row, (responses, row_scores) in enumerate(zip(counts, scores, strict=True)):
        if responses < 2:
            raise SimpoError(f"{label} row {row} has one response; a comparison needs at least two")
        if row_scores is None:
            if responses > 2:
                raise SimpoError(f"{label} row {row} has {responses} responses but no scores to rank them by")
            continue
        # False if a score is NaN.
        descending = all(a >= b for a, b in pairwise(row_scores)) and row_scores[0] > row_scores[-1]
        if len(row_scores) != responses or not descending:
            raise SimpoError(f"{label} row {row}: scores must be one per response, best first, and not all equal")


# ---- Dates and times.


def check_times(dataset: Dataset, label: str) -> None:
    """Raise :class:`SimpoError` for a column with a date, time or duration that Python cannot represent."""
    for name in dataset.column_names:
        for chunk in dataset.data.column(name).chunks:
            for array in _time_arrays(chunk):
                try:
                    _extremes(array).to_pylist()
                except (OverflowError, ValueError, pa.ArrowException) as error:
                    raise SimpoError(
                        f"{label}: the column {name!r} has a date or time that cannot be read ({one_line(error)}); "
                        "correct or remove it"
                    ) from error


def _time_arrays(array: pa.Array) -> Iterator[pa.Array]:
    """Yield the dates, times and durations in an array, at any depth."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        yield from _time_arrays(array.storage)
    elif pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        yield array
    elif pa.types.is_struct(kind):
        for column in array.flatten():
            yield from _time_arrays(column)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _time_arrays(array.flatten())


def _extremes(array: pa.Array) -> pa.Array:
    """Return the smallest and the largest value; if Python can represent both, it can represent all."""
    numbers = pa.int32() if array.type.bit_width == 32 else pa.int64()
    found = pc.min_max(array.view(numbers))
    return pa.array([found["min"].as_py(), found["max"].as_py()], numbers).view(array.type)
