"""A data set by name: a file, a folder or an id of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from simpo.data.files import KINDS, SUFFIXES, add_where, content_digest, load_file
from simpo.data.rows import concatenate
from simpo.errors import SimpoError

# Suffixes that no hub id ends in: a name with one of them is meant as a file.
_FILE_SUFFIX = re.compile(r"\.(jsonl?|parquet|csv|tsv|arrow|txt|gz|zst|bz2|xz|zip|ya?ml)$")
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def load_rows(name: str, *, split: str, config: str | None = None) -> Dataset:
    """Rows of a file, a folder or a hub data set, as they are (see :mod:`simpo.data.rows`).

    Args:
        name: a file; a folder written by ``save_to_disk``, or whose sub-folders or files are named by
            split (``train.jsonl``, ``hh_train-0001.parquet``), or all of whose files are the training
            split because none names a split; or a hub id.
        split: which split to take; a single file has none and is taken as it is.
        config: configuration of a hub data set.

    Raises:
        SimpoError: no such file, folder, split or hub data set, or one that cannot be read.
    """
    path = _path(name)
    if path.is_file():
        return load_file(path, path.name)
    if path.is_dir():
        return _load_folder(path, split)
    if _looks_like_a_path(name):
        raise SimpoError(f"{name}: file not found; give {KINDS}, a folder or a hub id (org/name)")
    return _load_from_hub(name, split, config)


def is_single_file(name: str) -> bool:
    """Whether ``name`` is a file, which holds one split only."""
    return _path(name).is_file()


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(_FILE_SUFFIX.search(name))


def _load_folder(folder: Path, split: str) -> Dataset:
    if _is_saved(folder):
        return _load_saved(folder, split)
    if (folder / split).is_dir():
        folder = folder / split
        if _is_saved(folder):
            return _load_saved(folder, split)
        chosen = _data_files(folder)
    else:
        chosen = _files_of_split(folder, split)
    if not chosen:
        raise SimpoError(f"{folder}: no data files in this folder; known are {KINDS}")
    return concatenate([load_file(path, path.name) for path in chosen])


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))


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
    return add_where(dataset, label, _hub_digest(dataset, label, config))


def _hub_digest(dataset: Dataset, label: str, config: str | None) -> str:
    """Fingerprint of the downloaded rows; the builder's own tells configurations and revisions apart."""
    return content_digest([], f"{label}\0{config}\0{dataset._fingerprint}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for ~nobody
