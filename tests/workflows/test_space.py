"""What a sweep varies, from command-line options."""

from __future__ import annotations

import pytest

from simpo.errors import SimpoError
from simpo.workflows.sweep_study import Axis, combinations, one_at_a_time, read_axes

KEYS = {"learning_rate": float, "seed": int, "objective": str, "beta": float | None, "output_dir": str | None}


def axes(**given):
    return read_axes({key: [text] for key, text in given.items()}, KEYS)


def test_values_and_ranges_become_axes():
    given = {"learning_rate": ["3e-7,1e-6"], "seed": ["1..64"], "beta": ["2"], "x": ["[1, 2]"], "y": ["1", "2,3"]}
    rate, seed = read_axes(given, KEYS)
    assert rate == Axis("learning_rate", ("3e-7", "1e-6"))
    assert seed == Axis("seed", ("1", "64"), int)
    assert (str(rate), str(seed)) == ("learning_rate 3e-7, 1e-6", "seed 1 to 64 (logarithmic)")
    assert not read_axes({"data": ["../a..b"]}, KEYS)  # not numbers


def test_a_grid_is_every_combination_with_the_last_axis_varying_fastest():
    found = list(combinations(axes(objective="simpo,dpo", beta="1,2,3")))
    assert found == [{"objective": o, "beta": b} for o in ("simpo", "dpo") for b in ("1", "2", "3")]


def test_one_at_a_time_covers_every_value():
    found = list(one_at_a_time(axes(objective="simpo,dpo", beta="1..30")))
    assert {"objective": "dpo", "beta": "1"} in found
    assert {"objective": "simpo", "beta": "30"} in found
    assert len(found) == 4


@pytest.mark.parametrize(
    ("given", "value", "end"),
    [
        ({"learning_rate": "1e-6,3e-7,5e-7"}, "3e-7", "smallest"),
        ({"learning_rate": "1e-6,3e-7,5e-7"}, "1e-6", "largest"),
        ({"learning_rate": "1e-6,3e-7,5e-7"}, "5e-7", None),
        ({"objective": "simpo,dpo"}, "dpo", None),
        ({"learning_rate": "1e-7..1e-5"}, "1.4e-7", "smallest"),  # within a tenth of two decades
        ({"learning_rate": "1e-7..1e-5"}, "1e-6", None),
        ({"beta": "1..2"}, "1.95", "largest"),
        ({"seed": "1..20"}, "20", "largest"),
    ],
)
def test_values_at_the_end_of_an_axis_are_recognized(given, value, end):
    assert axes(**given)[0].end(value) == end


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": "1,2"}, "learning_rat: unknown key; did you mean learning_rate?"),
        ({"output_dir": "a,b"}, "output_dir"),
        ({"beta": "1,,2"}, "empty value"),
        ({"beta": "1,2,1"}, "1 is given twice"),
        ({"beta": "0.1,.10"}, ".10 is given twice"),
        ({"beta": "2..1"}, "smaller number first"),
        ({"seed": "1..2.5"}, "whole numbers"),
        ({"objective": "1..2"}, "cannot be a range"),
    ],
)
def test_mistakes_are_reported(given, message):
    with pytest.raises(SimpoError, match=message.replace("?", r"\?")):
        axes(**given)
