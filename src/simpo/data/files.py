"""One file to rows: JSON and JSON lines (plain, gzip, zstandard), parquet, csv and arrow.

Whatever is read is cached under the SHA-256 of the file's content, so a changed file never gives old rows.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import importlib
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from simpo.data.rows import JSON_FEATURES, ROW, WHERE, Row, as_json
from simpo.errors import SimpoError

_COLUMNAR = (".parquet", ".arrow")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".csv", *_COLUMNAR)
KINDS = ".jsonl[.gz|.zst], .json[.gz|.zst], .parquet, .csv, .arrow"
# Part of every cache key: raise it when the rows made from the same file change.
_FORMAT = "2"
# How an Arrow stream and an Arrow file end.
_ARROW_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")


def load_file(path: Path, label: str) -> Dataset:
    """Rows of one file.

    Args:
        path: a file with one of :data:`SUFFIXES`.
        label: what messages call it, e.g. ``"train.jsonl.gz"``; rows are ``label:line`` for JSON lines,
            ``label[index]`` for a JSON list and ``label row index`` for the others. Cells of CSV files are text.

    Raises:
        SimpoError: the file is of another kind, empty, or not what its suffix says.
    """
    if not path.name.endswith(SUFFIXES):
        raise SimpoError(f"{path}: unknown kind of file; known are {KINDS}")
    digest = content_digest([path], label)
    return (_load_columnar if path.suffix in _COLUMNAR else _load_generated)(path, label, digest)


def content_digest(paths: list[Path], label: str) -> str:
    """Fingerprint of what the files hold and of the label that their rows carry."""
    digest = hashlib.sha256(f"{_FORMAT}\0{label}\0".encode())
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise SimpoError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:32]


def add_where(dataset: Dataset, label: str, digest: str) -> Dataset:
    """Add the column that says where each row of a columnar data set comes from: ``label row index``."""
    if taken := {ROW, WHERE} & set(dataset.column_names):
        raise SimpoError(f"{label}: the column name {taken.pop()!r} is used internally; rename the column")
    where = [f"{label} row {index}" for index in range(len(dataset))]
    return dataset.add_column(WHERE, where, new_fingerprint=digest)


def _load_columnar(path: Path, label: str, digest: str) -> Dataset:
    kind = path.suffix.removeprefix(".")
    # The builders' own cache goes by path and modification time; a folder per content is safe.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "simpo" / digest
    if kind == "arrow" and not _tail(path).endswith(_ARROW_ENDS):  # a stream cut between two batches reads as whole
        raise SimpoError(f"{path}: not a readable arrow file: it does not end as one does")
    try:
        empty = kind == "parquet" and not pq.read_metadata(path).num_rows  # which the builder cannot read
        if not empty:
            dataset = load_dataset(kind, data_files=glob.escape(str(path)), split="train", cache_dir=str(cache))
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise SimpoError(f"{path}: not a readable {kind} file: {reason[0]}") from error
    if empty or not len(dataset):
        raise SimpoError(f"{path}: no rows")
    return add_where(dataset, label, digest)


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - 8))
        return file.read()


def _load_generated(path: Path, label: str, digest: str) -> Dataset:
    try:
        return Dataset.from_generator(
            _csv_rows if path.suffix == ".csv" else _json_rows,
            features=JSON_FEATURES,
            gen_kwargs={"path": str(path), "label": label},
            fingerprint=digest,
        )
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, SimpoError):
            raise cause from None
        if isinstance(cause, OSError):
            raise SimpoError(f"{datasets.config.HF_DATASETS_CACHE}: the cache cannot be written: {cause}") from error
        raise


def _json_rows(path: str, label: str) -> Iterator[Row]:
    """Yield the rows of a JSON file: a list of objects if it starts with ``[``, else an object a line."""
    count = 0
    try:
        if path.endswith(".zst"):
            _check_frames(Path(path))
        with _open_text(Path(path)) as file:
            holds_list = next((text for line in file if (text := line.strip())), "").startswith("[")
        with _open_text(Path(path)) as file:
            for row, where in (_list_items if holds_list else _lines)(file, path, label):
                if not isinstance(row, dict):
                    raise SimpoError(f"{where}: not a JSON object; a row is an object of named columns")
                count += 1
                yield {ROW: as_json(row), WHERE: where}
    except _reading_errors() as error:
        raise SimpoError(f"{path}: cannot be read: {error}") from error
    if not count:
        raise SimpoError(f"{path}: no rows")


def _csv_rows(path: str, label: str) -> Iterator[Row]:
    """Yield the rows of a CSV file (RFC 4180); every cell is the text that stands there."""
    csv.field_size_limit(2**31 - 1)
    count = 0
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            if not header:
                raise SimpoError(f"{path}: not a readable csv file: no header in its first line")
            _check_header(header, path)
            before = lines.line_num
            for cells in lines:
                start, before = before + 1, lines.line_num
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise SimpoError(
                        f"{path}:{start}: {len(cells)} fields, but the header has {len(header)} "
                        f"({', '.join(header)}); quote fields that contain commas"
                    )
                yield {ROW: as_json(dict(zip(header, cells, strict=True))), WHERE: f"{label} row {count}"}
                count += 1
    except csv.Error as error:
        raise SimpoError(f"{path}:{before + 1}: not a readable csv file: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SimpoError(f"{path}: cannot be read: {error}; a CSV file is UTF-8 text") from error
    if not count:
        raise SimpoError(f"{path}: no rows")


def _check_header(header: list[str], path: str) -> None:
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise SimpoError(f"{path}:1: the header has the column {repeated[0]!r} more than once; rename one of them")
    if padded := [name for name in header if name != name.strip()]:
        raise SimpoError(f"{path}:1: the column name {padded[0]!r} has white space around it; remove it")
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other:
        raise SimpoError(f"{path}:1: the fields are separated by {other!r}; save the file with commas")


def _list_items(file: IO[str], path: str, label: str) -> Iterator[tuple[object, str]]:
    for index, item in enumerate(_parsed(file.read(), path, 1)):
        yield item, f"{label}[{index}]"


def _lines(file: IO[str], path: str, label: str) -> Iterator[tuple[object, str]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _parsed(line.rstrip(), path, number), f"{label}:{number}"


def _parsed(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise SimpoError(
            f"{path}:{first_line - 1 + error.lineno}: not JSON: {error.msg} (column {error.colno}); "
            "the file holds one object a line, or one list of objects"
        ) from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets in one another
        raise SimpoError(f"{path}:{first_line}: JSON that is not read: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _open_text(path: Path) -> IO[str]:
    # utf-8-sig: files written on Windows may start with a byte order mark.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".zst":
        return _zstandard(path).open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _check_frames(path: Path) -> None:
    """Raise EOFError for a file that ends within a frame, which the library's reader takes for the end."""
    new = _zstandard(path).ZstdDecompressor().decompressobj
    frame, whole = new(), True
    with path.open("rb") as file:
        while packed := file.read(2**16):
            while packed:
                frame.decompress(packed)
                whole, packed = frame.eof, frame.unused_data
                if whole:
                    frame = new()
    if not whole:
        raise EOFError("the file ends within compressed data")


def _zstandard(path: Path) -> ModuleType:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise SimpoError(f"{path}: reading .zst needs zstandard: pip install 'simpo[zstd]'") from error


def _reading_errors() -> tuple[type[Exception], ...]:
    """What a file that is damaged, or not what its suffix says, raises."""
    zstandard: Any = sys.modules.get("zstandard")
    errors = (OSError, EOFError, UnicodeDecodeError, zlib.error)
    return (*errors, zstandard.ZstdError) if zstandard else errors
