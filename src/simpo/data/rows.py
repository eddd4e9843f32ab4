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

from datasets import Dataset, Features, Value, concatenate_datasets

from simpo.errors import SimpoError

# Underscored so that they do not clash with the columns of anybody's data.
ROW = "_row"
WHERE = "_where"
JSON_FEATURES = Features({ROW: Value("string"), WHERE: Value("string")})

Row = dict[str, Any]


class BadRow(Exception):  # noqa: N818 - it is counted, not shown as an error
    """A row that cannot be used. ``reason`` says why, without what differs from row to row: it is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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
    if ROW in batch:
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
    return json.dumps(value, default=_as_text)


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return str(value)


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
