"""Win rates by their definition."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from simpo import SimpoError
from simpo.evaluation.head_to_head import Contest, compare_answers, read_contests, win_rate
from simpo.statistics import mean_interval


def test_win_rate_counts_every_meeting_of_a_prompt():
    rng = np.random.default_rng(0)
    a = [rng.integers(0, 4, size=3).tolist() for _ in range(20)]
    b = [rng.integers(0, 4, size=2).tolist() for _ in range(20)]
    shares = []
    for ours, theirs in zip(a, b, strict=True):
        points = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(ours, theirs)]
        shares.append(sum(points) / len(points))
    found = win_rate(a, b)
    assert found == mean_interval(shares)
    assert found.n == 20
    assert win_rate(b, a).value == pytest.approx(1 - found.value)


def test_win_rate_of_one_answer_each():
    found = win_rate([[1.0], [2.0], [3.0], [0.0]], [[0.0], [2.0], [1.0], [5.0]])
    assert found.value == (1 + 0.5 + 1 + 0) / 4


def test_answers_are_paired_by_prompt(tmp_path):
    def write(name, ids):
        rows = [{"id": key, "prompt": f"p{key}", "responses": [f"{name}{key}"]} for key in ids]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    a, b = write("a", "xyz"), write("b", "zxy")
    contests = read_contests(a, b)
    assert [(c.prompt, c.a["responses"], c.b["responses"]) for c in contests] == [
        (f"p{key}", [f"a{key}"], [f"b{key}"]) for key in "xyz"
    ]
    with pytest.raises(SimpoError, match="2 prompts are in one of them only"):
        read_contests(a, write("c", "xyw"))
    with pytest.raises(SimpoError, match="cannot be read"):
        read_contests(a, tmp_path / "nowhere")


def test_figures_of_both_models():
    """By hand: two prompts, two answers each."""

    def side(*answers, finished=(True, True)):
        return {"responses": list(answers), "response_ids": [[0] * len(a) for a in answers], "finished": list(finished)}

    contests = [
        Contest("p", a=side("x", "xx"), b=side("xxx", "x", finished=(True, False))),
        Contest("q", a=side("xxxx", "xx"), b=side("x", "x")),
    ]
    found = {
        (m.name, m.stage): m for m in compare_answers(contests, lambda p, t: len(t), {"is_q": lambda p, t: p == "q"})
    }
    assert found["win_rate", "after"].value == ((0 + 0.5 + 0 + 1) / 4 + 1.0) / 2
    assert found["score", "after"].value == (1.5 + 3) / 2
    assert found["score", "before"].value == (2 + 1) / 2
    assert found["is_q", "before"].value == 0.5
    assert found["response_tokens", "after"].value == 2.25
    assert found["end_of_turn_rate", "before"].value == 0.75
    assert found["end_of_turn_rate", "after"].value == 1.0
    assert {metric.n for (name, _), metric in found.items() if name != "end_of_turn_rate"} == {2}  # prompts
    assert found["end_of_turn_rate", "after"].n == 4  # answers
    assert found["score", "after"].low == mean_interval([1.5, 3.0]).low
