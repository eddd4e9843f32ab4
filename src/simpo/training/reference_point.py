"""What KTO's reference point is estimated from: every prompt with a response to another prompt."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from simpo.data.mapping import TOKENS
from simpo.errors import SimpoError
from simpo.training.batches import MISMATCHED_IDS, response_counts
from simpo.training.finite import describe_rows


def with_mismatched(rows: Dataset, max_length: int, label: str) -> Dataset:
    """``rows`` with the column ``mismatched_ids``: for each a response of a row with another prompt.

    Which one depends on the data alone. The rows stand in a circle, those of one prompt together, and each takes the
    response of the row that stands as far ahead as the most frequent prompt has rows: all are taken once, and none
    meets its own prompt. Where that one does not fit, or half of the rows share a prompt, the next one that does is
    taken.

    Args:
        rows: tokenized.
        max_length: most tokens of a prompt with its mismatched response.
        label: names the data set in messages.

    Raises:
        SimpoError: all prompts are the same, or no response to another prompt fits after one.
    """
    if MISMATCHED_IDS in rows.column_names:
        return rows
    prompt_of = _numbered_prompts(rows)
    if not prompt_of.any():
        raise SimpoError(
            f"{label}: all prompts are the same, and KTO's reference point needs responses to other prompts"
        )
    table = rows.with_format("arrow")
    room = max_length - pc.list_value_length(table["prompt_ids"]).to_numpy()
    counts = response_counts(rows)
    response_of = np.cumsum(counts) - counts + np.arange(len(rows)) % counts  # of pairs chosen and rejected in turn
    responses = pc.list_flatten(table["response_ids"]).take(response_of)
    partner = _partners(prompt_of, room, pc.list_value_length(responses).to_numpy())
    if (partner < 0).any():
        alone = describe_rows(rows, np.flatnonzero(partner < 0).tolist())
        raise SimpoError(
            f"{label}: max_length {max_length} leaves no room for a response to another prompt in {alone}; raise it"
        )
    return rows.add_column(MISMATCHED_IDS, responses.take(partner), feature=TOKENS)


def _numbered_prompts(rows: Dataset) -> np.ndarray:
    """``[rows]`` the number of each row's prompt, in the order in which they first occur."""
    numbers: dict[bytes, int] = {}
    prompts = (ids for batch in rows.select_columns("prompt_ids").iter(1000) for ids in batch["prompt_ids"])
    return np.array([numbers.setdefault(np.array(ids, np.int32).tobytes(), len(numbers)) for ids in prompts])


def _partners(prompt_of: np.ndarray, room: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``[rows]`` whose response each row takes; -1 where none fits. ``sizes`` ``[rows]`` are the responses' lengths."""
    circle = np.argsort(prompt_of, kind="stable")
    ahead = int(np.bincount(prompt_of).max())
    partner = np.full(len(circle), -1)
    for place, row in enumerate(circle):
        for step in range(len(circle)):
            other = circle[(place + ahead + step) % len(circle)]
            if prompt_of[other] != prompt_of[row] and sizes[other] <= room[row]:
                partner[row] = other
                break
    return partner


def mismatched_rows(rows: Dataset) -> Dataset:
    """Every prompt of ``rows`` with its mismatched response only, as tokenized rows."""
    table = rows.select_columns(["prompt_ids", MISMATCHED_IDS]).with_format("arrow")[:]
    responses = table[MISMATCHED_IDS].combine_chunks()
    alone = pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32), responses)
    return Dataset(pa.table({"prompt_ids": table["prompt_ids"], "response_ids": alone}))
