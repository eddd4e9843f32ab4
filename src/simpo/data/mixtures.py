"""Several data sets as one, with the meaning that alignment-handbook's recipes give to these keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from simpo.data.rows import concatenate, select_columns
from simpo.data.sources import has_one_split, load_rows
from simpo.errors import SimpoError

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
