"""Rows that were tokenized elsewhere are validated before anything relies on them."""

from __future__ import annotations

import pytest
from datasets import Dataset, Features, LargeList, List, Value

from simpo.data.verification import check_tokenized
from simpo.errors import SimpoError

GOOD = {"prompt_ids": [[1, 5], [1, 6, 7]], "response_ids": [[[5, 2], [6, 2]], [[7, 2], [8]]]}
SINGLE = GOOD | {"response_ids": [[[5, 2]], [[6, 2, 3]]]}


@pytest.mark.parametrize(
    "extra", [{}, {"scores": [[1.0, 0.0], [2.0, 1.0]]}, {"where": ["a", "b"], "extra": ["{}", "{}"]}]
)
def test_good_rows_pass(extra):
    check_tokenized(Dataset.from_dict(GOOD | extra), "train")
    check_tokenized(Dataset.from_dict(SINGLE | {"label": [True, False]}), "train")
    check_tokenized(Dataset.from_dict(SINGLE | {"scored": [[[True, False]], [[True, True, False]]]}), "train")


def test_other_integer_types_and_large_lists_pass():
    for kind in (List, LargeList):
        ids = kind(Value("uint16"))
        check_tokenized(Dataset.from_dict(GOOD, Features({"prompt_ids": ids, "response_ids": kind(ids)})), "train")


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": [[1], [1, -7]]},
        {"prompt_ids": [[1], [2**40]]},
        {"prompt_ids": [[1.5], [2.0]]},
        {"prompt_ids": ["abc", "d"]},
        {"prompt_ids": [["a"], ["b"]]},
        {"prompt_ids": [3, 4]},
        {"prompt_ids": [[1], None]},
        {"prompt_ids": [[1], [1, None]]},
        {"prompt_ids": [[1], []]},
        {"prompt_ids": [[True], [False]]},
        {"prompt_ids": [[[1]], [[2]]]},
        {"response_ids": [[5, 2], [6, 2]]},
        {"response_ids": [[[5], [2]], None]},
        {"response_ids": [[[5], [2]], []]},
        {"response_ids": [[[5], [2]], [[5], []]]},
        {"response_ids": [[[5], [2]], [[5], None]]},
        {"response_ids": [[[5], [2]], [[5], [-1]]]},
        {"where": [1, 2]},
        {"extra": [None, "{}"]},
        {"label": [True, False]},
        {"response_ids": SINGLE["response_ids"], "label": ["yes", "no"]},
        {"response_ids": SINGLE["response_ids"], "label": [True, None]},
        {"response_ids": SINGLE["response_ids"], "scored": [[[True, True]], [[True]]]},
        {"response_ids": SINGLE["response_ids"], "scored": [[[1, 1]], [[1, 0, 0]]]},
    ],
)
def test_bad_rows_are_reported(change):
    with pytest.raises(SimpoError, match=rf"^train rows? \d.*{list(change)[-1]}"):
        check_tokenized(Dataset.from_dict(GOOD | change), "train")


def test_reported_row_numbers_refer_to_the_whole_dataset():
    rows = [[1]] * 2500 + [[-3]] + [[1]] * 10
    with pytest.raises(SimpoError, match=r"^train row 2500: prompt_ids"):
        check_tokenized(Dataset.from_dict({"prompt_ids": rows, "response_ids": [[[2], [3]]] * 2511}), "train")
