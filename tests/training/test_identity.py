"""Run identity: datasets differ if anything trained on differs, and only then."""

from __future__ import annotations

import pytest
from datasets import Dataset, concatenate_datasets

from simpo.training.batches import rows_digest

PAIRS = [
    {"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]], "scored": [[True], [True, True]], "where": f"a.jsonl:{line}"}
    for line in range(2500)
]


def changed(**columns) -> Dataset:
    return Dataset.from_list([PAIRS[0] | columns, *PAIRS[1:]])


def test_storage_format_and_origin_do_not_matter():
    rows = Dataset.from_list(PAIRS)
    parts = concatenate_datasets([rows.select(range(700)), rows.select(range(700, 2500))])
    elsewhere = rows.remove_columns("where").add_column("where", ["b.jsonl:1"] * 2500)
    assert rows_digest(rows) == rows_digest(parts) == rows_digest(elsewhere) == rows_digest(rows.select(range(2500)))


@pytest.mark.parametrize(
    "other",
    [
        changed(prompt_ids=[1, 3]),
        changed(prompt_ids=[1], response_ids=[[2, 3], [4, 5]], scored=[[True, True], [True, True]]),
        changed(response_ids=[[3, 4], [5]], scored=[[True, True], [True]]),
        changed(response_ids=[[3], [4], [5]], scored=[[True], [True], [True]]),
        changed(scored=[[True], [True, False]]),
        Dataset.from_list(PAIRS[:-1]),
        Dataset.from_list([*PAIRS, PAIRS[0]]),
        Dataset.from_list(PAIRS).add_column("label", [True] * 2500),
        Dataset.from_list(PAIRS).add_column("image_digests", [["a" * 64]] + [[]] * 2499),
    ],
)
def test_everything_trained_on_matters(other):
    assert rows_digest(other) != rows_digest(Dataset.from_list(PAIRS))


def test_row_order_matters():
    rows = changed(prompt_ids=[7])
    assert rows_digest(rows) != rows_digest(rows.select([1, 0, *range(2, 2500)]))
