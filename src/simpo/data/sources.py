"""Loads datasets by name, from a file, a folder or the hub, and mixtures of several.

Supported files are JSON and JSON Lines (plain, gzip, zstandard), parquet, csv and arrow. Rows are cached under the
SHA-256 of the file's content, so a changed file never yields stale rows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import datasets
from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from simpo.data.columnar import check_expansion, load_columnar
from simpo.data.rows import (
    JSON_FEATURES,
    ROW,
    WHERE,
    as_json,
    concatenate,
    rename_columns,
    select_columns,
    undecoded,
    with_where,
)
from simpo.data.verification import cached, check_ratio
from simpo.errors import SimpoError, one_line, third_party
from simpo.runs.manifest import file_digest

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".csv", ".parquet", ".arrow")
_SUPPORTED = ".jsonl[.gz|.zst], .json[.gz|.zst], .parquet, .csv, .arrow"
# Part of every cache key: increase it when the same file yields different rows than before.
_FORMAT = "3"
# Characters in a line of JSON; a longer one is an attack or an accident, and would take gigabytes of memory.
_MAX_LINE = 1 << 27
# No hub id ends in these suffixes: a name that does is meant to be a file.
_FILE_SUFFIX = re.compile(r"\.(jsonl?|parquet|csv|tsv|arrow|txt|gz|zst|bz2|xz|zip|ya?ml)$")
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def load_rows(
    name: str,
    *,
    split: str,
    config: str | None = None,
    column_mapping: Mapping[str, str] | None = None,
    any_split: bool = False,
) -> Dataset:
    """Load the rows of a file, a folder or a hub dataset unchanged (see :mod:`simpo.data.rows`).

    Args:
        name: a file, a folder or a hub id. A folder was written by ``save_to_disk``, or its subfolders or files are
            named after splits (``train.jsonl``, ``hh_train-0001.parquet``); if none is, all files are the training
            split.
        split: the split to load, or slices in the notation of ``datasets``: ``train[:90%]``, ``train[10:]+test``. A
            single file, or a folder with one saved dataset, is the split ``train`` and any split in its name.
        config: configuration of a hub dataset.
        column_mapping: old column name -> new column name, as in ``Dataset.rename_columns``.
        any_split: accept a single file for any split, because the caller knows what it is for.

    Raises:
        SimpoError: the file, folder, split, column or hub dataset does not exist or cannot be read.
    """
    path = _path(name)
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise SimpoError(f"{str(path)[:60]}...: cannot be looked up: {error.strerror}") from error
    if exists:
        rows = _load_slices(lambda base: _load_local(path, base, any_split=any_split), split, name)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or _FILE_SUFFIX.search(name):
        pattern = "; a path is taken literally, not as a pattern" if set(name) & set("*?[") else ""
        raise SimpoError(f"{name}: file not found{pattern}; give {_SUPPORTED}, a folder or a hub id (org/name)")
    else:
        rows = _load_from_hub(name, split, config)
    return rename_columns(rows, column_mapping, name) if column_mapping else rows


def has_one_split(name: str) -> bool:
    """Whether ``name`` is a file, or a folder with one saved dataset; both have a single split."""
    path = _path(name)
    return path.is_file() or (path / "state.json").is_file()


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for ~nobody


def _load_slices(load: Callable[[str], Dataset], split: str, name: str) -> Dataset:
    """Load the slices of local splits that ``split`` asks for."""
    bases = [part.partition("[")[0].strip() for part in split.split("+")]
    if bases == [split]:
        return load(split)
    rows = {base: load(base) for base in bases}
    try:
        slices = ReadInstruction.from_spec(split).to_absolute({base: len(found) for base, found in rows.items()})
    except ValueError as error:
        raise SimpoError(f"{name}: split {split!r}: {one_line(error)}; write train[:90%] or train[100:]") from error
    selected = [rows[part.splitname].select(range(part.from_, part.to)) for part in slices if part.from_ < part.to]
    if not selected:
        sizes = ", ".join(f"{len(base_rows)} in {base}" for base, base_rows in rows.items())
        raise SimpoError(f"{name}: split {split!r} has no rows (there are {sizes})")
    return concatenate(selected)


def _load_local(path: Path, split: str, *, any_split: bool) -> Dataset:
    if has_one_split(str(path)) and not (any_split or split == "train" or _names_split(path, split)):
        raise SimpoError(
            f"{path}: no split {split!r}; a single file has only the split 'train': name a slice of it, "
            "e.g. train[:90%] and train[90%:], or use another file"
        )
    if not path.is_dir():
        return _load_file(path)
    folder = path
    if not _is_saved(folder):
        if not _data_files(folder) and (folder / "data").is_dir():  # a copy of a hub repository
            folder /= "data"
        if not (folder / split).is_dir():
            return _load_files(_files_of_split(folder, split), folder, split)
        folder /= split
    return _load_saved(folder, split) if _is_saved(folder) else _load_files(_data_files(folder), folder, split)


def _load_files(files: list[Path], folder: Path, split: str) -> Dataset:
    if not files:
        folders = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        hint = f"it has the folders {folders}" if folders else f"supported are {_SUPPORTED}"
        raise SimpoError(f"{folder}: no data files in this folder for split {split!r}; {hint}")
    return concatenate(list(map(_load_file, files)))


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _data_files(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in visible if path.name.endswith(SUFFIXES))


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the files named after the split; all files if no split is named and a training split is wanted."""
    files = _data_files(folder)
    chosen = [path for path in files if _names_split(path, split)]
    if chosen or not files:
        return chosen
    if "train" in split and not any(_names_split(path, word) for path in files for word in _SPLIT_WORDS):
        return files
    raise SimpoError(
        f"{folder}: no file for split {split!r} in this folder; it has {', '.join(path.name for path in files[:5])}"
    )


def _names_split(path: Path, split: str) -> bool:
    """Whether the file name contains the split as a word: ``train.jsonl``, ``hh_train-00000.parquet``."""
    return re.search(rf"(?:^|[-._ ]){re.escape(split)}(?:[-._ ]|\d)", path.name) is not None


def _load_saved(folder: Path, split: str) -> Dataset:
    """Load a folder written by ``save_to_disk``."""
    with third_party(f"{folder}: not a readable save_to_disk folder"):
        saved = load_from_disk(str(folder))
    label = folder.name
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise SimpoError(f"{folder}: no split {split!r}; it has {', '.join(map(str, saved))}")
        label, saved = f"{folder.name}[{split}]", saved[split]
    if not len(saved):
        raise SimpoError(f"{label}: no rows")
    for file in saved.cache_files:
        check_expansion(Path(file["filename"]))
    # Rows that were tokenized before saving already name their source.
    if {"prompt_ids", "response_ids"} <= set(saved.column_names):
        return undecoded(saved)
    return with_where(saved, label, _digest([Path(f["filename"]) for f in saved.cache_files], label))


def _load_from_hub(name: str, split: str, config: str | None) -> Dataset:
    offline = " (offline mode is on)" if datasets.config.HF_HUB_OFFLINE else ""
    with third_party(f"{name}: neither a local file or folder nor a hub dataset that can be loaded{offline}"):
        dataset: Any = load_dataset(name, config, split=split)
    label = f"{name}[{split}]"
    if not len(dataset):
        raise SimpoError(f"{label}: no rows")
    # The builder's fingerprint distinguishes configurations and revisions.
    return with_where(dataset, label, _digest([], f"{label}\0{config}\0{dataset._fingerprint}"))


# ---- One file.


def _load_file(path: Path) -> Dataset:
    """Load the rows of one file.

    A row's source is ``file:line`` for JSON Lines, ``file[index]`` for a JSON list and ``file row index`` for other
    formats. The cells of CSV files are text.
    """
    if not path.is_file():  # reading a device or a pipe may never end
        raise SimpoError(f"{path}: neither a regular file nor a folder; copy its content to a file")
    if not path.name.endswith(SUFFIXES):
        raise SimpoError(f"{path}: unsupported file type; supported are {_SUPPORTED}")
    with third_party(f"{path}: the file name is not UTF-8; rename the file"):
        path.name.encode()
    digest = _digest([path], path.name)
    if path.suffix in (".parquet", ".arrow"):
        return load_columnar(path, digest)
    read_rows = _csv_rows if path.suffix == ".csv" else _json_rows
    options: dict[str, Any] = {"gen_kwargs": {"path": path}, "fingerprint": digest}
    try:
        return cached(lambda: Dataset.from_generator(read_rows, features=JSON_FEATURES, **options))
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, SimpoError):
            raise cause from None
        if isinstance(cause, OSError):
            raise SimpoError(f"{datasets.config.HF_DATASETS_CACHE}: the cache cannot be written: {cause}") from error
        raise


def _digest(paths: list[Path], label: str) -> str:
    """Return the fingerprint of the files' content and of the label that their rows carry."""
    digest = hashlib.sha256(f"{_FORMAT}\0{label}\0".encode())
    for path in paths:
        digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()[:32]


def _json_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a JSON file: a list of objects if it starts with ``[``, otherwise one object per line."""
    count = 0
    damaged: tuple[type[Exception], ...] = (OSError, EOFError, UnicodeDecodeError, zlib.error)
    try:
        if path.suffix == ".zst":
            damaged = (*damaged, _zstandard(path).ZstdError)
            _check_frames(path)
        with _open_text(path) as file:
            is_list = next((text for piece in _pieces(file, path) if (text := piece.strip())), "").startswith("[")
        with _open_text(path) as file:
            items: Iterator[tuple[str, Any]]
            if is_list:
                text = "".join(_pieces(file, path))
                items = ((f"{path.name}[{index}]", item) for index, item in enumerate(_parse(text, path, 1)))
            else:
                numbered = enumerate(_lines(file, path), start=1)
                lines = ((number, line.rstrip()) for number, line in numbered if line.strip())
                items = ((f"{path.name}:{number}", _parse(line, path, number)) for number, line in lines)
            for where, row in items:
                if not isinstance(row, dict):
                    raise SimpoError(f"{where}: not a JSON object; every row must be an object with named columns")
                count += 1
                yield {ROW: as_json(row), WHERE: where}
    except damaged as error:
        raise SimpoError(f"{path}: cannot be read: {error}") from error
    if not count:
        raise SimpoError(f"{path}: no rows")


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object_without_duplicate_keys)
    except json.JSONDecodeError as error:
        raise SimpoError(
            f"{path}:{first_line - 1 + error.lineno}: not JSON: {error.msg} (column {error.colno}); "
            "the file must contain one object per line, or one list of objects"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, or thousands of nested brackets
        raise SimpoError(f"{path}:{first_line}: JSON that cannot be read: {error}") from error


def _object_without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"an object has the key {counts.most_common(1)[0][0]!r} twice")
    return mapping


def _open_text(path: Path) -> IO[str]:
    # utf-8-sig: files written on Windows may start with a byte order mark.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".zst":
        return _zstandard(path).open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(partial(file.readline, _MAX_LINE), ""), start=1):
        check_ratio(path, file.buffer.tell())  # type: ignore[attr-defined]
        if len(line) == _MAX_LINE:
            raise SimpoError(f"{path}:{number}: the line has over {_MAX_LINE:,} characters; split it into several rows")
        yield line


def _pieces(file: IO[str], path: Path) -> Iterator[str]:
    for piece in iter(partial(file.read, 1 << 16), ""):
        check_ratio(path, file.buffer.tell())  # type: ignore[attr-defined]
        yield piece


def _check_frames(path: Path) -> None:
    """Raise EOFError for a file truncated within a frame, which the library's reader takes for the end of the data."""
    new = _zstandard(path).ZstdDecompressor().decompressobj
    frame, complete, expanded = new(), True, 0
    with path.open("rb") as file:
        while packed := file.read(2**12):  # at most about 128 MiB of text, even if it is malicious
            while packed:
                expanded += len(frame.decompress(packed))
                check_ratio(path, expanded)
                complete, packed = frame.eof, frame.unused_data
                if complete:
                    frame = new()
    if not complete:
        raise EOFError("the file ends within compressed data")


def _zstandard(path: Path) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise SimpoError(f"{path}: reading .zst needs zstandard: pip install 'simpo[zstd]'") from error


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file (RFC 4180); every cell stays text."""
    csv.field_size_limit(2**31 - 1)
    count = before = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
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
                yield {ROW: as_json(dict(zip(header, cells, strict=True))), WHERE: f"{path.name} row {count}"}
                count += 1
    except csv.Error as error:
        raise SimpoError(f"{path}:{before + 1}: not a readable csv file: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SimpoError(f"{path}: cannot be read: {error}; CSV files must be UTF-8") from error
    if not count:
        raise SimpoError(f"{path}: no rows")


def _check_header(header: list[str], path: Path) -> None:
    if not header:
        raise SimpoError(f"{path}: not a readable csv file: the first line has no header")
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise SimpoError(f"{path}:1: the header has the column {repeated[0]!r} more than once; rename one of them")
    if padded := [name for name in header if name != name.strip()]:
        raise SimpoError(f"{path}:1: the column name {padded[0]!r} has whitespace around it; remove it")
    if delimiter := next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None):
        raise SimpoError(f"{path}:1: the fields are separated by {delimiter!r}; save the file with commas")


# ---- Mixtures of several datasets; the keys mean what they mean in alignment-handbook's recipes.


def load_mixture(
    mixer: Mapping[str, float],
    splits: Sequence[str],
    configs: Sequence[str | None] | None = None,
    column_mapping: Mapping[str, str] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Load a ``dataset_mixer`` with ``dataset_splits``, as in the paper's recipes.

    Args:
        mixer: dataset (see :func:`load_rows`) -> fraction of its training rows to take, namely the first
            ``int(fraction * rows)``.
        splits: splits with ``train`` in their name are for training, those with ``test`` for evaluation; the latter are
            never subsampled.
        configs: configuration of each hub dataset.
        column_mapping: old column name -> new column name, in every dataset.

    Returns:
        Training and evaluation rows (``None`` without a test split), concatenated and shuffled with seed 42.
    """
    if not isinstance(mixer, Mapping) or not mixer:
        raise SimpoError("dataset_mixer: not a mapping of datasets to fractions, e.g. {org/name: 1.0}")
    if configs and len(configs) != len(mixer):
        raise SimpoError(f"dataset_configs: {len(configs)} configurations for {len(mixer)} datasets")
    for split in splits:
        if "train" not in split and "test" not in split:
            raise SimpoError(f"dataset_splits: {split!r} has neither 'train' nor 'test' in its name")
    if not any("train" in split for split in splits):
        raise SimpoError("dataset_splits: no split with 'train' in its name")
    training, evaluation = [], []
    whole_splits = any("[" not in split for split in splits)
    for (name, fraction), config in zip(mixer.items(), configs or [None] * len(mixer), strict=True):
        _check_fraction("dataset_mixer", name, fraction)
        if len(splits) > 1 and whole_splits and has_one_split(name):
            raise SimpoError(  # its rows would be used for both training and evaluation
                f"dataset_mixer: {name} is one file and cannot be both {' and '.join(splits)}; give a folder with one "
                "file per split, or set dataset_splits: [train]"
            )
        for split in splits:
            rows = load_rows(name, split=split, config=config, column_mapping=column_mapping, any_split=True)
            if "train" in split:
                training.append(rows.select(range(int(fraction * len(rows)))))
            else:
                evaluation.append(rows)
    train = concatenate(training).shuffle(seed=42)
    if not len(train):
        raise SimpoError("dataset_mixer: the fractions leave no training rows; increase them")
    return train, concatenate(evaluation).shuffle(seed=42) if evaluation else None


def load_mixture_list(
    mixture: Mapping[str, Any], column_mapping: Mapping[str, str] | None = None
) -> tuple[Dataset, Dataset | None]:
    """Load a ``dataset_mixture``, the newer format.

    Args:
        mixture: ``datasets``, a list of ``{id, config, split, columns, weight}`` in which only ``id`` is required
            (``split`` defaults to ``train``, ``weight`` to 1.0); ``seed`` (default 0); and ``test_split_size``, a
            fraction or a number of rows.
        column_mapping: old column name -> new column name, in every dataset, applied before ``columns`` are selected.

    Returns:
        Training rows and, with ``test_split_size``, evaluation rows. Each dataset is shuffled before the fraction
        ``weight`` is taken from it, and the concatenation is shuffled again.
    """
    _check_keys(mixture, ("datasets", "seed", "test_split_size"), required="datasets")
    entries = mixture["datasets"]
    if not isinstance(entries, list) or not entries:
        raise SimpoError("dataset_mixture: 'datasets' is not a list of {id, config, split, columns, weight}")
    seed = mixture.get("seed", 0)
    if not isinstance(seed, int):
        raise SimpoError(f"dataset_mixture: seed {seed!r} is not a whole number")
    parts = []
    for entry in entries:
        _check_keys(entry, ("id", "config", "split", "columns", "weight"), required="id")
        name, split = entry["id"], entry.get("split") or "train"
        rows = load_rows(name, split=split, config=entry.get("config"), column_mapping=column_mapping)
        if entry.get("columns") is not None:
            rows = select_columns(rows, entry["columns"], name)
        weight = 1.0 if entry.get("weight") is None else entry["weight"]
        _check_fraction("dataset_mixture", name, weight)
        parts.append(rows.shuffle(seed=seed).select(range(int(len(rows) * weight))))
    rows = concatenate(parts).shuffle(seed=seed)
    if not len(rows):
        raise SimpoError("dataset_mixture: the weights leave no rows; increase them")
    size = mixture.get("test_split_size")
    if size is None:
        return rows, None
    try:
        split_rows = rows.train_test_split(test_size=size, seed=seed)
    except (ValueError, TypeError) as error:
        raise SimpoError(f"dataset_mixture: test_split_size {size!r} is not valid for {len(rows)} rows") from error
    return split_rows["train"], split_rows["test"]


def _check_fraction(key: str, name: str, fraction: object) -> None:
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise SimpoError(f"{key}: {name}: {fraction!r} is not a fraction between 0 and 1")


def _check_keys(mapping: object, known: Sequence[str], *, required: str) -> None:
    if not isinstance(mapping, Mapping) or required not in mapping:
        raise SimpoError(f"dataset_mixture: {mapping!r} is not a mapping with {required!r}")
    if unknown := [name for name in mapping if name not in known]:
        raise SimpoError(f"dataset_mixture: unknown key {unknown[0]!r}; known are {', '.join(known)}")
