"""GSM8K's final numbers, from constructed texts."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from simpo import SimpoError
from simpo.evaluation.academic import Gsm8kSettings, final_number, read_problems


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = 7.\n#### 7", "7"),
        ("#### 12 apples, not 13", "12"),
        ("first #### 1, then #### 2", "2"),
        ("The answer is $1,234.50.", "1234.5"),
        ("It costs 5 dollars, 2 more than 3.", "3"),
        ("minus: -4", "-4"),
        ("between 3-4", "4"),
        ("half, .5", "0.5"),
        ("#### ?\nperhaps 8", "8"),
        ("7.0", "7"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_a_text_ends_with(text, number):
    found = final_number(text)
    assert found == (None if number is None else Decimal(number))


def test_problems_are_read_from_a_file(tmp_path):
    rows = [{"question": f"q{number}", "answer": f"#### {number}"} for number in range(4)]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_problems(str(file), "test", 2) == [("q0", Decimal(0)), ("q1", Decimal(1))]
    assert len(read_problems(str(file), "test", None)) == 4
    for limit in (0, -1):
        with pytest.raises(SimpoError, match=f"^limit: .*{limit}"):
            Gsm8kSettings(model="m", output_dir=tmp_path, limit=limit)
    file.write_text(
        '{"question": "q", "answer": "So it is <<2*3=6>>6.\\n#### 1,006"}\n{"question": "q", "answer": "6"}\n'
    )
    assert read_problems(str(file), "test", 1) == [("q", Decimal(1006))]
    with pytest.raises(SimpoError, match=r"test.jsonl:2: answer: .*####"):
        read_problems(str(file), "test", None)
