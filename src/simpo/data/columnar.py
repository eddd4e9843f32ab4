"""Loads one parquet or arrow file."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from simpo.data.rows import with_where
from simpo.data.verification import cached, check_ratio
from simpo.errors import SimpoError, one_line

# How an Arrow stream and an Arrow file end.
_ARROW_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
)
_BATCH = 1000
_ROW_SIZE = 64  # bytes of a row without any column: the text that names its source


def load_columnar(path: Path, digest: str) -> Dataset:
    """Load the rows of a parquet or arrow file.

    Args:
        path: the file.
        digest: fingerprint of its content, under which its rows are cached.

    Raises:
        SimpoError: the file is damaged, has no rows or expands to far more than its size.
    """
    kind = path.suffix.removeprefix(".")
    if kind == "arrow":
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, io.SEEK_END) - 8))
            if not file.read().endswith(_ARROW_ENDS):  # a stream truncated between two batches would seem complete
                raise SimpoError(f"{path}: not a readable arrow file: it is truncated or damaged at the end")
    options: dict[str, Any] = {"data_files": glob.escape(str(path)), "split": "train"}
    try:
        empty = kind == "parquet" and not pq.read_metadata(path).num_rows  # the builder cannot read an empty one
        if not empty:
            # The builders key their cache by path and modification time; a folder per content is safe.
            if not Path(_cache_folder(digest)).exists():
                check_expansion(path)
            dataset = cached(lambda: load_dataset(kind, **options, cache_dir=_cache_folder(digest)))
    except SimpoError:
        raise
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise SimpoError(f"{path}: not a readable {kind} file: {reason}") from error
    if empty or not len(dataset):
        raise SimpoError(f"{path}: no rows")
    return with_where(dataset, path.name, digest)


def _cache_folder(digest: str) -> str:
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "simpo" / digest)


def check_expansion(path: Path) -> None:
    """Raise :class:`SimpoError` if the rows of a parquet or arrow file are far larger than the file.

    Parquet stores a repeated text once, and neither format needs space for null columns, so a few bytes may hold
    gigabytes. Sizes are summed batch by batch, and repeated texts are only counted.
    """
    expanded = 0
    for batch in _parquet_batches(path) if path.suffix == ".parquet" else _arrow_batches(path):
        expanded += _ROW_SIZE * batch.num_rows + sum(map(_expanded_size, batch.columns))
        check_ratio(path, expanded)


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    metadata = pq.read_metadata(path)
    stored = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    check_ratio(path, max(stored, _ROW_SIZE * metadata.num_rows))
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        yield from file.iter_batches(_BATCH)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        try:
            batches: Iterable[pa.RecordBatch] = pa.ipc.open_stream(file)
        except (OSError, pa.ArrowInvalid):
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        yield from batches


def _expanded_size(array: pa.Array) -> int:
    """Return the bytes of an array's values if each is stored separately, with a pointer for each null value."""
    kind = array.type
    if isinstance(array, pa.DictionaryArray):
        if not any(holds_text(kind.value_type) for holds_text in _TEXT_TYPES):
            return 8 * len(array)
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return array.indices.nbytes + (pc.sum(lengths).as_py() or 0)
    if pa.types.is_null(kind):
        return 8 * len(array)
    if pa.types.is_struct(kind):
        return sum(map(_expanded_size, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return 4 * len(array) + _expanded_size(array.flatten())
    return array.nbytes
