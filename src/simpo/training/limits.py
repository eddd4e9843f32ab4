"""Tokenized rows that are too long for a model, or that hold ids it does not know, found before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from simpo.errors import SimpoError
from simpo.models.checkpoint import Limits
from simpo.training.batches import MISMATCHED_IDS, response_counts
from simpo.training.finite import describe_rows


def check_rows(limits: Limits, rows: Dataset, label: str) -> None:
    """Look at tokenized rows; a row's length is that of its prompt with its longest response.

    Raises:
        SimpoError: a row is too long, or has a token id that the model does not know; names it and the limit.
    """
    table = rows.with_format("arrow")
    if limits.positions is not None:
        lengths = _lengths(table)
        if len(too_long := np.flatnonzero(lengths > limits.positions)):
            raise SimpoError(
                f"{label}: {describe_rows(rows, too_long.tolist())}: {limits.fault(int(lengths[too_long[0]]))}; "
                f"set max_length to {limits.positions} or less"
            )
    columns = [name for name in ("prompt_ids", "response_ids") if _outside(table[name], limits.embeddings)]
    for place, row in enumerate(rows.select_columns(["prompt_ids", "response_ids"]) if columns else ()):
        if fault := limits.fault(0, [*row["prompt_ids"], *(one for ids in row["response_ids"] for one in ids)]):
            raise SimpoError(
                f"{label}: {describe_rows(rows, [place])}: {fault}; use the model's own tokenizer, or resize the "
                "model's embeddings to this one"
            )


def _lengths(table: Any) -> np.ndarray:
    """``[rows]`` tokens of each prompt with its longest response."""
    counts = response_counts(table)
    sizes = pc.list_value_length(pc.list_flatten(table["response_ids"])).to_numpy()
    longest = np.maximum.reduceat(sizes, np.cumsum(counts) - counts)
    if MISMATCHED_IDS in table.column_names:
        longest = np.maximum(longest, pc.list_value_length(table[MISMATCHED_IDS]).to_numpy())
    return pc.list_value_length(table["prompt_ids"]).to_numpy() + longest


def _outside(column: Any, embeddings: int | None) -> bool:
    """Whether some id of a column, however nested, is not one of so many embeddings."""
    while hasattr(column.type, "value_type"):
        column = pc.list_flatten(column)
    if embeddings is None or not len(column):
        return False
    bounds = pc.min_max(column).as_py()
    return bounds["min"] < 0 or bounds["max"] >= embeddings
