"""Data sets by name (a file, a folder or a hub id), and mixtures of several."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, load_dataset, load_from_disk

from simpo.data.files import KINDS, SUFFIXES, add_where, content_digest, load_file
from simpo.data.rows import concatenate, rename_columns, select_columns
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


# ---- Several data sets as one, with the meaning that alignment-handbook's recipes give to these keys.


_MIXER_SEED = 42


_MIXTURE_KEYS = ("datasets", "seed", "test_split_size")


_ENTRY_KEYS = ("id", "config", "split", "columns", "weight")


def load_mixture(
    mixer: Mapping[str, float],
    splits: Sequence[str],
    configs: Sequence[str | None] | None = None,
    column_mapping: Mapping[str, str] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Load ``dataset_mixer`` with ``dataset_splits``, as the paper's recipes write them.

    Args:
        mixer: data set (see :func:`simpo.data.sources.load_rows`) -> fraction of its training rows to take,
            the first ``int(fraction * rows)``.
        splits: a split whose name contains ``train`` is for training, one with ``test`` for evaluation,
            which is never subsampled.
        configs: configuration of each hub data set.
        column_mapping: old name -> new name of columns, of every data set.

    Returns:
        Training and evaluation rows (``None`` without a test split), concatenated and shuffled with seed 42.

    Raises:
        SimpoError: a fraction outside 0 to 1, a split of neither kind, or a data set that cannot be loaded.
    """
    if not isinstance(mixer, Mapping) or not mixer:
        raise SimpoError("dataset_mixer: not a mapping of data sets to fractions, e.g. {org/name: 1.0}")
    if configs and len(configs) != len(mixer):
        raise SimpoError(f"dataset_configs: {len(configs)} configurations for {len(mixer)} data sets")
    for split in splits:
        if "train" not in split and "test" not in split:
            raise SimpoError(f"dataset_splits: {split!r} has neither 'train' nor 'test' in its name")
    if not any("train" in split for split in splits):
        raise SimpoError("dataset_splits: no split with 'train' in its name")
    training, evaluation = [], []
    for (name, fraction), config in zip(mixer.items(), configs or [None] * len(mixer), strict=True):
        _check_fraction("dataset_mixer", name, fraction)
        for split in splits:
            rows = _load_split(name, split, config, splits, column_mapping)
            if "train" in split:
                training.append(rows.select(range(int(fraction * len(rows)))))
            else:
                evaluation.append(rows)
    train = concatenate(training).shuffle(seed=_MIXER_SEED)
    if not len(train):
        raise SimpoError("dataset_mixer: the fractions leave no training row; make them larger")
    return train, concatenate(evaluation).shuffle(seed=_MIXER_SEED) if evaluation else None


def load_mixture_list(
    mixture: Mapping[str, Any], column_mapping: Mapping[str, str] | None = None
) -> tuple[Dataset, Dataset | None]:
    """Load ``dataset_mixture``, the newer form.

    Args:
        mixture: ``datasets``, a list of ``{id, config, split, columns, weight}`` of which only ``id`` is
            needed (``split`` is ``train``, ``weight`` 1.0); ``seed`` (0); ``test_split_size``, a fraction
            or a number of rows.
        column_mapping: old name -> new name of columns, of every data set, before ``columns`` are taken.

    Returns:
        Training rows and, with ``test_split_size``, evaluation rows. Each data set is shuffled before its
        fraction ``weight`` is taken, and the whole again.

    Raises:
        SimpoError: an unknown key, a wrong value, or a data set that cannot be loaded.
    """
    _check_keys("dataset_mixture", mixture, _MIXTURE_KEYS, needed="datasets")
    entries = mixture["datasets"]
    if not isinstance(entries, list) or not entries:
        raise SimpoError("dataset_mixture: 'datasets' is not a list of {id, config, split, columns, weight}")
    seed = mixture.get("seed", 0)
    if not isinstance(seed, int):
        raise SimpoError(f"dataset_mixture: seed {seed!r} is not a whole number")
    rows = concatenate([_load_entry(entry, seed, column_mapping) for entry in entries]).shuffle(seed=seed)
    if not len(rows):
        raise SimpoError("dataset_mixture: the weights leave no row; make them larger")
    size = mixture.get("test_split_size")
    if size is None:
        return rows, None
    try:
        parts = rows.train_test_split(test_size=size, seed=seed)
    except (ValueError, TypeError) as error:
        raise SimpoError(f"dataset_mixture: test_split_size {size!r} does not split {len(rows)} rows") from error
    return parts["train"], parts["test"]


def _load_split(
    name: str, split: str, config: str | None, splits: Sequence[str], column_mapping: Mapping[str, str] | None
) -> Dataset:
    """One split; a single file must not be taken for training and again for evaluation."""
    whole = [split for split in splits if "[" not in split]
    if len(splits) > 1 and whole and has_one_split(name):
        raise SimpoError(
            f"dataset_mixer: {name} is one file and cannot be split {' and '.join(splits)}; give a folder "
            "with a file a split, or set dataset_splits: [train]"
        )
    return load_rows(name, split=split, config=config, column_mapping=column_mapping, any_split=True)


def _load_entry(entry: Mapping[str, Any], seed: int, column_mapping: Mapping[str, str] | None) -> Dataset:
    _check_keys("dataset_mixture", entry, _ENTRY_KEYS, needed="id")
    name, weight = entry["id"], entry.get("weight")
    rows = load_rows(
        name, split=entry.get("split") or "train", config=entry.get("config"), column_mapping=column_mapping
    )
    if entry.get("columns") is not None:
        rows = select_columns(rows, entry["columns"], name)
    weight = 1.0 if weight is None else weight
    _check_fraction("dataset_mixture", name, weight)
    return rows.shuffle(seed=seed).select(range(int(len(rows) * weight)))


def _check_fraction(key: str, name: str, fraction: object) -> None:
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise SimpoError(f"{key}: {name}: {fraction!r} is not a fraction between 0 and 1")


def _check_keys(key: str, value: object, known: Sequence[str], *, needed: str) -> None:
    if not isinstance(value, Mapping) or needed not in value:
        raise SimpoError(f"{key}: {value!r} is not a mapping with {needed!r}")
    unknown = [name for name in value if name not in known]
    if unknown:
        raise SimpoError(f"{key}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
