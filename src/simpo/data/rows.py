"""The rows of a data set, in either of two representations.

JSON sources are kept as two string columns, the row's JSON text and where it came from, because rows of
one file may have different columns and types, which Arrow columns cannot hold. Columnar sources (parquet,
csv, arrow, hub) keep their columns and gain the one that says where a row came from. :func:`rows_of` turns
a batch of either into dictionaries.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
)

from simpo.errors import SimpoError

# Underscored so that they do not clash with the columns of anybody's data.
ROW = "_row"
WHERE = "_where"
JSON_FEATURES = Features({ROW: Value("string"), WHERE: Value("string")})

Row = dict[str, Any]


class BadRow(Exception):  # noqa: N818 - it is counted, not shown as an error
    """A row that cannot be used. ``reason`` says why, without what differs from row to row: it is counted."""

    kind = "bad"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Tie(BadRow):
    """A row that says that neither of two responses is better: sound, and of no use. It is dropped."""

    kind = "dropped"


class UnknownShape(BadRow):
    """The row's columns are those of no known shape."""


def rows_of(batch: Mapping[str, Sequence[Any]], indices: Sequence[int], label: str) -> list[tuple[Row, str]]:
    """Turn a batch of a data set into ``(row, where)`` pairs.

    Args:
        batch: column name -> values, as ``Dataset.map(batched=True)`` hands it over.
        indices: the rows' positions in the data set.
        label: names the data set where its rows do not say themselves where they come from.
    """
    wheres = batch.get(WHERE) or [f"{label} row {index}" for index in indices]
    if ROW in batch and WHERE in batch:
        return [(json.loads(text), where) for text, where in zip(batch[ROW], wheres, strict=True)]
    columns = [column for column in batch if column != WHERE]
    return [
        ({column: _without_nulls(batch[column][position]) for column in columns}, where)
        for position, where in enumerate(wheres)
    ]


def _without_nulls(value: Any) -> Any:
    """A cell without the nulls that Arrow adds to objects of which other rows have more keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def as_dataset(rows: object, name: str) -> Dataset:
    """Rows that were given in Python as one data set.

    Raises:
        SimpoError: they are neither a data set nor a list of rows; says what to pass.
    """
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(repr, rows))
        raise SimpoError(f"{name}: a {type(rows).__name__} with the splits {splits}; pass one of them, dataset[split]")
    if isinstance(rows, IterableDataset):
        raise SimpoError(
            f"{name}: a streaming data set; pass Dataset.from_list(list(dataset.take(n))) or load it whole"
        )
    if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
        raise SimpoError(f"{name}: a {type(rows).__name__}; pass a datasets.Dataset or a list of dictionaries")
    if rows and all("prompt_ids" in row for row in rows):
        return Dataset.from_list(list(rows))
    # JSON rows, because Dataset.from_list drops every column that the first row does not have.
    wheres = [f"{name}[{index}]" for index in range(len(rows))]
    return Dataset.from_dict({ROW: [as_json(row) for row in rows], WHERE: wheres}, features=JSON_FEATURES)


def other_columns(row: Mapping[str, Any], *used: str) -> Row:
    """The columns that are not used, to be carried through."""
    return {column: value for column, value in row.items() if column not in used}


def columns_of(row: Mapping[str, Any]) -> str:
    """Names of a row's columns, for messages."""
    return ", ".join(sorted(row)) or "none"


def as_json(value: object) -> str:
    """JSON text of any cell; what JSON has no type for (dates, decimals) is written as its text.

    ASCII only, because Arrow refuses the lone surrogates that JSON may hold.
    """
    return json.dumps(value, default=_as_json_type)


def _as_json_type(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Concatenate data sets of either representation; where their columns differ, all become JSON rows."""
    if len(datasets) == 1:
        return datasets[0]
    if any(dataset.features != datasets[0].features for dataset in datasets):
        datasets = [_as_json_rows(dataset) for dataset in datasets]
    return concatenate_datasets(list(datasets))


def select_columns(dataset: Dataset, columns: Sequence[str], label: str) -> Dataset:
    """Keep the named columns (``columns`` of a ``dataset_mixture``).

    Raises:
        SimpoError: if the data set, or one of its JSON rows, lacks one of them.
    """
    if ROW in dataset.column_names:
        return dataset.map(_select_keys, fn_kwargs={"columns": list(columns)}, desc=f"Columns of {label}")
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        found = ", ".join(column for column in dataset.column_names if column != WHERE)
        raise SimpoError(f"dataset_mixture: {label} has no column {missing[0]!r}; it has {found}")
    return dataset.select_columns([*columns, WHERE])


def rename_columns(dataset: Dataset, mapping: Mapping[str, str], name: str) -> Dataset:
    """Rename columns (``column_mapping``: old name -> new name), all at once, so that names can be swapped.

    Raises:
        SimpoError: no row has a column of the old name, or another column has the new one.
    """
    if not isinstance(mapping, Mapping) or not all(isinstance(item, str) for pair in mapping.items() for item in pair):
        raise SimpoError(f"column_mapping: {mapping!r} is not {{column of the data: column of this toolkit}}")
    if ROW in dataset.column_names:
        found = set().union(*(json.loads(text) for text in dataset[ROW]))
    else:
        found = set(dataset.column_names) - {WHERE}
    if missing := [column for column in mapping if column not in found]:
        raise SimpoError(f"column_mapping: {name} has no column {missing[0]!r}; it has {', '.join(sorted(found))}")
    kept = [*mapping.values(), *(found - set(mapping))]
    if taken := [column for column in mapping.values() if kept.count(column) > 1]:
        raise SimpoError(f"column_mapping: {name} would have two columns {taken[0]!r}; rename the other one too")
    if ROW in dataset.column_names:
        return dataset.map(_rename_keys, fn_kwargs={"mapping": dict(mapping)}, desc=f"Columns of {name}")
    return dataset.rename_columns(dict(mapping))


def _rename_keys(row: Row, mapping: dict[str, str]) -> Row:
    return {ROW: as_json({mapping.get(column, column): value for column, value in json.loads(row[ROW]).items()})}


def _select_keys(row: Row, columns: list[str]) -> Row:
    values = json.loads(row[ROW])
    missing = [column for column in columns if column not in values]
    if missing:
        raise SimpoError(f"dataset_mixture: {row[WHERE]} has no column {missing[0]!r}")
    return {ROW: as_json({column: values[column] for column in columns})}


def _as_json_rows(dataset: Dataset) -> Dataset:
    if ROW in dataset.column_names:
        return dataset
    return dataset.map(
        _batch_as_json,
        batched=True,
        remove_columns=[column for column in dataset.column_names if column != WHERE],
        features=JSON_FEATURES,
        desc="Rows as JSON",
    )


def _batch_as_json(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    pairs = rows_of(batch, range(len(batch[WHERE])), label="")
    return {ROW: [as_json(row) for row, _ in pairs], WHERE: [where for _, where in pairs]}
