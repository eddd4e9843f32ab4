"""A data set by name: a file, a folder or an id of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, load_dataset, load_from_disk

from simpo.data.files import KINDS, SUFFIXES, add_where, content_digest, load_file
from simpo.data.rows import concatenate, rename_columns
from simpo.errors import SimpoError

# Suffixes that no hub id ends in: a name with one of them is meant as a file.
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
    """Rows of a file, a folder or a hub data set, as they are (see :mod:`simpo.data.rows`).

    Args:
        name: a file; a folder written by ``save_to_disk``, or whose sub-folders or files are named by
            split (``train.jsonl``, ``hh_train-0001.parquet``), or all of whose files are the training
            split because none names a split; or a hub id.
        split: which split to take, or slices in the notation of ``datasets``: ``train[:90%]``, ``train[10:]+test``.
            A single file, or folder of one saved data set, is the split ``train`` and those that its name contains.
        config: configuration of a hub data set.
        column_mapping: old name -> new name of columns, as of ``Dataset.rename_columns``.
        any_split: a single file is whatever split is asked for, because its use says what it is.

    Raises:
        SimpoError: no such file, folder, split, column or hub data set, or one that cannot be read.
    """
    path = _path(name)
    if _exists(path):
        rows = _sliced(lambda base: _load_local(path, base, any_split=any_split), split, name)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or _FILE_SUFFIX.search(name):
        pattern = "; a path is taken literally, not as a pattern" if set(name) & set("*?[") else ""
        raise SimpoError(f"{name}: file not found{pattern}; give {KINDS}, a folder or a hub id (org/name)")
    else:
        rows = _load_from_hub(name, split, config)
    return rename_columns(rows, column_mapping, name) if column_mapping else rows


def has_one_split(name: str) -> bool:
    """Whether ``name`` is a file or a folder of one saved data set, which hold one split only."""
    path = _path(name)
    return path.is_file() or (path / "state.json").is_file()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that is too long
        raise SimpoError(f"{str(path)[:60]}...: cannot be looked up: {error.strerror}") from error


def _sliced(load: Callable[[str], Dataset], split: str, name: str) -> Dataset:
    """The slices of local splits that ``split`` asks for."""
    bases = [part.partition("[")[0].strip() for part in split.split("+")]
    if bases == [split]:
        return load(split)
    rows = {base: load(base) for base in bases}
    try:
        slices = ReadInstruction.from_spec(split).to_absolute({base: len(found) for base, found in rows.items()})
    except ValueError as error:
        raise SimpoError(f"{name}: split {split!r}: {_first_line(error)}; write train[:90%] or train[100:]") from error
    found = [rows[part.splitname].select(range(part.from_, part.to)) for part in slices if part.from_ < part.to]
    if not found:
        sizes = ", ".join(f"{len(whole)} in {base}" for base, whole in rows.items())
        raise SimpoError(f"{name}: split {split!r} has no rows (there are {sizes})")
    return concatenate(found)


def _load_local(path: Path, split: str, *, any_split: bool) -> Dataset:
    if has_one_split(str(path)) and not (any_split or split == "train" or _names_split(path, split)):
        raise SimpoError(
            f"{path}: no split {split!r}; a single file has only the split 'train': name a slice of it, "
            "e.g. train[:90%] and train[90%:], or another file"
        )
    return load_file(path, path.name) if path.is_file() else _load_folder(path, split)


def _load_folder(folder: Path, split: str) -> Dataset:
    if _is_saved(folder):
        return _load_saved(folder, split)
    if not _data_files(folder) and (folder / "data").is_dir():  # a copy of a hub repository
        folder /= "data"
    if (folder / split).is_dir():
        folder /= split
        if _is_saved(folder):
            return _load_saved(folder, split)
        chosen = _data_files(folder)
    else:
        chosen = _files_of_split(folder, split)
    if not chosen:
        inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        has = f"it has the folders {inside}" if inside else f"known are {KINDS}"
        raise SimpoError(f"{folder}: no data files in this folder for split {split!r}; {has}")
    return concatenate([load_file(path, path.name) for path in chosen])


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _data_files(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in visible if path.name.endswith(SUFFIXES))


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files that name the split; all of them if none names any and a training split is wanted."""
    files = _data_files(folder)
    chosen = [path for path in files if _names_split(path, split)]
    if chosen or not files:
        return chosen
    if "train" in split and not any(_names_split(path, word) for path in files for word in _SPLIT_WORDS):
        return files
    names = ", ".join(path.name for path in files[:5])
    raise SimpoError(f"{folder}: no file of split {split!r} in this folder; it has {names}")


def _names_split(path: Path, split: str) -> bool:
    """Whether the split is a word of the file's name: ``train.jsonl``, ``hh_train-00000.parquet``."""
    return re.search(rf"(?:^|[-._ ]){re.escape(split)}(?:[-._ ]|\d)", path.name) is not None


def _load_saved(folder: Path, split: str) -> Dataset:
    """A folder that ``save_to_disk`` wrote."""
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:
        raise SimpoError(f"{folder}: not a readable save_to_disk folder: {_first_line(error)}") from error
    label = folder.name
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise SimpoError(f"{folder}: no split {split!r}; it has {', '.join(map(str, saved))}")
        label, saved = f"{folder.name}[{split}]", saved[split]
    if not len(saved):
        raise SimpoError(f"{label}: no rows")
    # Rows that were tokenized before they were saved say where they come from already.
    if {"prompt_ids", "response_ids"} <= set(saved.column_names):
        return saved
    return add_where(saved, label, content_digest([Path(f["filename"]) for f in saved.cache_files], label))


def _load_from_hub(name: str, split: str, config: str | None) -> Dataset:
    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:
        offline = " (offline mode is on)" if datasets.config.HF_HUB_OFFLINE else ""
        raise SimpoError(
            f"{name}: neither a file or folder here nor a hub data set that can be loaded{offline}: "
            f"{_first_line(error)}"
        ) from error
    assert not isinstance(dataset, IterableDataset)
    label = f"{name}[{split}]"
    if not len(dataset):
        raise SimpoError(f"{label}: no rows")
    # The builder's own fingerprint tells configurations and revisions apart.
    return add_where(dataset, label, content_digest([], f"{label}\0{config}\0{dataset._fingerprint}"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for ~nobody
