"""Loads one parquet or arrow file."""

from __future__ import annotations

import glob
import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from simpo.data.rows import with_where
from simpo.data.verification import cached
from simpo.errors import SimpoError, one_line

# How an Arrow stream and an Arrow file end.
_ARROW_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")


def load_columnar(path: Path, digest: str) -> Dataset:
    """Load the rows of a parquet or arrow file.

    Args:
        path: the file.
        digest: fingerprint of its content, under which its rows are cached.

    Raises:
        SimpoError: the file is damaged or has no rows.
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
            dataset = cached(
                lambda: load_dataset(
                    kind, **options, cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE) / "simpo" / digest)
                )
            )
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise SimpoError(f"{path}: not a readable {kind} file: {reason}") from error
    if empty or not len(dataset):
        raise SimpoError(f"{path}: no rows")
    return with_where(dataset, path.name, digest)
