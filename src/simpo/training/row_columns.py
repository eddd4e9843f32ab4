"""Columns of the data that change the loss of their row: its weight, its label's probability, its margin, its beta."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Value

from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError
from simpo.objectives.objective import NON_NEGATIVE, POSITIVE, Bound
from simpo.training.batches import BETA, LABEL_PROBABILITY, MARGIN, WEIGHT

ROW_COLUMNS = {
    WEIGHT: NON_NEGATIVE,
    LABEL_PROBABILITY: Bound("must be in [0, 1]", lambda value: 0 <= value <= 1),
    MARGIN: NON_NEGATIVE,
    BETA: POSITIVE,
}


def with_row_columns(prepared: Prepared, names: Sequence[str], label: str, *, training: bool) -> Prepared:
    """Tokenized rows with the columns ``names``, checked, from the columns that the data had.

    Weights are for training only: held-out rows count equally. Rows of weight 0 are dropped, and counted. Held-out rows
    may be without the other columns, all of them or none.

    Raises:
        SimpoError: a row lacks a value, its value is out of bounds, or it does not have two responses, so that
            the value would not be of a pair; the message names file and row.
    """
    rows, report = prepared.dataset, prepared.report
    rows = rows.remove_columns([name for name in ROW_COLUMNS if name in rows.column_names and name not in names])
    if not names:
        return replace(prepared, dataset=rows)
    wheres = rows["where"][:] if "where" in rows.column_names else [f"{label} row {row}" for row in range(len(rows))]
    counts = pc.list_value_length(rows.with_format("arrow")["response_ids"]).to_pylist()
    for name in names:
        report.ignored = {key: count for key, count in report.ignored.items() if not key.startswith(f"column {name!r}")}
        values = _values(rows, name)
        if name in rows.column_names:
            rows = rows.remove_columns(name)
        if not training and (name == WEIGHT or all(value is None for value in values)):
            if name != WEIGHT:
                report.notices.append(f"no row has a {name}: the loss is evaluated without it")
            continue
        for where, count, value in zip(wheres, counts, values, strict=True):
            _check(name, value, where)
            if count != 2 and name != WEIGHT:
                has = "a single response" if count == 1 else f"{count} responses"
                raise SimpoError(f"{where}: row_columns: {name} is of a pair, and the row has {has}")
        rows = rows.add_column(name, list(map(float, values)), feature=Value("float64"))
    if training and WEIGHT in names:
        kept = np.flatnonzero(np.array(rows[WEIGHT][:]))
        if not len(kept):
            raise SimpoError(f"{label}: weight: 0 in every row; nothing would be trained")
        for row in np.setdiff1d(np.arange(len(rows)), kept):
            report.drop("weight 0", wheres[row])
        rows = rows.select(kept) if len(kept) < len(rows) else rows
    return replace(prepared, dataset=rows)


def has_column(rows: Dataset, name: str) -> bool:
    """Whether some row has a value for ``name``."""
    return any(value is not None for value in _values(rows, name))


def _values(rows: Dataset, name: str) -> list[Any]:
    """A value for each row: of its column, or among the other columns that the data had."""
    if name in rows.column_names:
        return rows[name][:]
    extras = rows["extra"][:] if "extra" in rows.column_names else ["{}"] * len(rows)
    return [json.loads(extra).get(name) if f'"{name}"' in extra else None for extra in extras]


def _check(name: str, value: Any, where: str) -> None:
    if value is None:
        raise SimpoError(f"{where}: there is no {name}, which row_columns asks for; every row needs one")
    bound = ROW_COLUMNS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SimpoError(f"{where}: {name}: {value!r} is not a finite number")
    if not bound.holds(value):
        raise SimpoError(f"{where}: {name} {bound.text}, not {value!r}")
