"""How long a text a model can read and which token ids it knows; rows that ask for more, before they reach it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from simpo.errors import SimpoError
from simpo.training.batches import MISMATCHED_IDS, response_counts
from simpo.training.finite import describe_rows


@dataclass(frozen=True)
class Limits:
    """What a model's configuration allows.

    Attributes:
        positions: most tokens of a text; None if there is no bound (no positions, ALiBi, dynamic RoPE scaling).
        embeddings: number of token ids; None if the configuration does not say.
    """

    positions: int | None
    embeddings: int | None

    @classmethod
    def of(cls, config: Any) -> Limits:
        """The limits of a model with this configuration."""
        text = config.get_text_config()
        return cls(_positions(text), getattr(text, "vocab_size", None))

    def fault(self, length: int, ids: Iterable[int] = ()) -> str | None:
        """Why a model cannot read a prompt and answer of ``length`` tokens with these ids, as text; None if it can."""
        if self.positions is not None and length > self.positions:
            return f"{length:,} tokens with its answer; the model has room for {self.positions:,}"
        if self.embeddings is not None:
            for token_id in ids:
                if not 0 <= token_id < self.embeddings:
                    return f"token id {token_id}; the model has embeddings for 0 to {self.embeddings - 1}"
        return None

    def check(self, rows: Dataset, label: str) -> None:
        """Look at tokenized rows; a row's length is that of its prompt with its longest response.

        Raises:
            SimpoError: a row is too long, or has a token id that the model does not know; names it and the limit.
        """
        table = rows.with_format("arrow")
        if self.positions is not None:
            lengths = _lengths(table)
            if len(too_long := np.flatnonzero(lengths > self.positions)):
                raise SimpoError(
                    f"{label}: {describe_rows(rows, too_long.tolist())}: {self.fault(int(lengths[too_long[0]]))}; "
                    f"set max_length to {self.positions} or less"
                )
        columns = [name for name in ("prompt_ids", "response_ids") if _outside(table[name], self.embeddings)]
        for place, row in enumerate(rows.select_columns(["prompt_ids", "response_ids"]) if columns else ()):
            if fault := self.fault(0, [*row["prompt_ids"], *(one for ids in row["response_ids"] for one in ids)]):
                raise SimpoError(
                    f"{label}: {describe_rows(rows, [place])}: {fault}; use the model's own tokenizer, or resize the "
                    "model's embeddings to this one"
                )


def _positions(text: Any) -> int | None:
    """The number of positions in a language model's configuration; None if there is no limit."""
    limit = getattr(text, "max_position_embeddings", None)
    ropes = getattr(text, "rope_parameters", None) or {}
    ropes = [ropes] if "rope_type" in ropes else [one for one in ropes.values() if isinstance(one, dict)]
    if limit is None or getattr(text, "alibi", False) or any(rope["rope_type"] == "dynamic" for rope in ropes):
        return None
    for rope in ropes:  # YaRN is switched on without raising max_position_embeddings
        if rope["rope_type"] == "yarn" and rope.get("original_max_position_embeddings"):
            limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return limit


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
