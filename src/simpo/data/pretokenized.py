"""Checks of tokenized rows, which may come from elsewhere, before anything relies on their shape."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from simpo.errors import SimpoError

_BATCH = 1000
_LARGEST_ID = np.iinfo(np.int32).max
# Columns with how deep their values are nested in lists, the type of the values, and its name.
_COLUMNS: dict[str, tuple[int, Callable[[pa.DataType], bool], str]] = {
    "prompt_ids": (1, pa.types.is_integer, "a list of token ids"),
    "response_ids": (2, pa.types.is_integer, "a list of token ids for each response"),
    "scored": (2, pa.types.is_boolean, "a list of true and false for each response"),
    "label": (0, pa.types.is_boolean, "true or false"),
    "where": (0, pa.types.is_string, "text"),
    "extra": (0, pa.types.is_string, "text"),
}


def check_tokenized(rows: Dataset, label: str) -> None:
    """Check the types, ids and lengths of a data set with ``prompt_ids`` and ``response_ids``.

    Raises:
        SimpoError: a column has another type, or a row lacks a value, has an empty list, an id that no model has, more
            than one response next to a label, or marks that are not as many as its tokens; names column and row.
    """
    names = [name for name in _COLUMNS if name in rows.column_names]
    batches = rows.select_columns(names).with_format("arrow").iter(_BATCH)
    for start, batch in zip(count(step=_BATCH), batches, strict=False):
        lengths = {name: _lengths(batch[name], name, f"{label} row", start) for name in names}
        responses, tokens = lengths["response_ids"]
        if "label" in lengths and len(wrong := np.flatnonzero(responses != 1)):
            raise SimpoError(f"{label} row {start + wrong[0]}: response_ids: a label belongs to one response")
        if (
            "scored" in lengths
            and (responses == 1).all()
            and any(not np.array_equal(*both) for both in zip(lengths["scored"], (responses, tokens), strict=True))
        ):
            raise SimpoError(f"{label} rows {start} to {start + len(batch) - 1}: scored: not as long as response_ids")


def _lengths(column: Any, name: str, place: str, start: int) -> list[np.ndarray]:
    """The lengths of a checked column's lists, level by level."""
    depth, has_type, expected = _COLUMNS[name]
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    row = np.arange(start, start + len(column))  # the row of each value
    found: list[np.ndarray] = []

    def refuse(wrong: Any, fault: str) -> None:
        if len(positions := np.flatnonzero(wrong)):
            raise SimpoError(f"{place} {row[positions[0]]}: {name}: {fault}; expected {expected}")

    for _ in range(depth):
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            raise SimpoError(f"{place} {start}: {name}: of type {column.type}; expected {expected}")
        refuse(column.is_null(), "null")
        found.append(pc.list_value_length(column).to_numpy(zero_copy_only=False))
        refuse(found[-1] == 0, "an empty list")
        row, column = row[pc.list_parent_indices(column)], pc.list_flatten(column)
    refuse(column.is_null(), "null")
    if not has_type(column.type):
        raise SimpoError(f"{place} {start}: {name}: of type {column.type}; expected {expected}")
    if pa.types.is_integer(column.type):
        ids = column.to_numpy(zero_copy_only=False)
        refuse((ids < 0) | (ids > _LARGEST_ID), "a number that no token has")
    return found


def check_rankings(rows: Dataset, label: str) -> None:
    """Check that every row is a comparison whose responses are ranked."""
    counts = pc.list_value_length(rows.with_format("arrow")["response_ids"]).to_pylist()
    scores = rows.with_format("arrow")["scores"].to_pylist() if "scores" in rows.column_names else [None] * len(rows)
    for row, (responses, row_scores) in enumerate(zip(counts, scores, strict=True)):
        if responses < 2:
            raise SimpoError(f"{label} row {row} has one response; at least two are compared")
        if row_scores is None:
            if responses > 2:
                raise SimpoError(f"{label} row {row} has {responses} responses but no scores to rank them by")
            continue
        falling = (
            all(a >= b for a, b in pairwise(row_scores)) and row_scores[0] > row_scores[-1]
        )  # false if one of them is NaN
        if len(row_scores) != responses or not falling:
            raise SimpoError(f"{label} row {row}: scores must be one per response, the best first, and not all equal")
