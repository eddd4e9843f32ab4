"""Win rates against their definition."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from simpo import SimpoError
from simpo.data.prompts import prompt_id
from simpo.evaluation.answers import read_answer_file
from simpo.evaluation.compare import PromptAnswers, compare_answers, read_matched, win_rate
from simpo.statistics import mean_interval, share_interval


def test_win_rate_counts_every_pair_of_answers_to_a_prompt():
    rng = np.random.default_rng(0)
    a = [rng.integers(0, 4, size=3).tolist() for _ in range(20)]
    b = [rng.integers(0, 4, size=2).tolist() for _ in range(20)]
    shares = []
    for ours, theirs in zip(a, b, strict=True):
        points = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(ours, theirs)]
        shares.append(sum(points) / len(points))
    found = win_rate(a, b)
    assert found == share_interval(shares)
    assert found.n == 20
    assert win_rate(b, a).value == pytest.approx(1 - found.value)


def test_win_rate_with_one_answer_each():
    found = win_rate([[1.0], [2.0], [3.0], [0.0]], [[0.0], [2.0], [1.0], [5.0]])
    assert found.value == (1 + 0.5 + 1 + 0) / 4


def write_answers(folder, name, ids):
    rows = [{"id": key, "prompt": f"p{key}", "responses": [f"{name}{key}"]} for key in ids]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_matched_by_prompt(tmp_path):
    a, b = write_answers(tmp_path, "a", "xyz"), write_answers(tmp_path, "b", "zxy")
    contests = read_matched(a, b)
    assert [(c.prompt, c.a["responses"], c.b["responses"]) for c in contests] == [
        (f"p{key}", [f"a{key}"], [f"b{key}"]) for key in "xyz"
    ]
    with pytest.raises(SimpoError, match="2 prompts"):
        read_matched(a, write_answers(tmp_path, "c", "xyw"))
    other = write_answers(tmp_path, "d", "xyz")
    other.write_text(other.read_text().replace('"py"', '"another question"'))
    with pytest.raises(SimpoError, match=r"id 'y'"):
        read_matched(a, other)
    with pytest.raises(SimpoError, match=r"nowhere\.jsonl: file not found"):
        read_matched(a, tmp_path / "nowhere.jsonl")


def test_both_file_formats_identify_the_same_prompts(tmp_path):
    """A prompt's id depends only on its content."""
    outputs = tmp_path / "model_outputs.json"
    outputs.write_text(json.dumps([{"instruction": "What is 1?", "output": "", "generator": "m"}]))
    sampled = tmp_path / "responses.jsonl"
    row = {"id": prompt_id("What is 1?"), "prompt": "What is 1?", "responses": ["One.", "It is 1."]}
    sampled.write_text(json.dumps(row) + "\n")
    [contest] = read_matched(sampled, outputs)
    assert (contest.a["responses"], contest.b["responses"]) == (["One.", "It is 1."], [""])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "id: expected text"),
        ({"id": "x", "prompt": "p"}, "responses: expected"),
        ({"id": "x", "prompt": "p", "responses": []}, "expected one or more texts"),
        ({"id": "x", "prompt": "p", "responses": [None]}, "expected one or more texts"),
        ({"id": "x", "prompt": "p", "responses": ["r"], "extra": None}, "extra: expected a mapping"),
        ({"id": 5, "prompt": "p", "responses": ["a"]}, "id: expected text, got 5"),
        ({"id": "x", "prompt": 7, "responses": ["a"]}, "prompt: expected text or messages, got 7"),
        ({"instruction": "x", "output": None}, "output: expected text"),
        ({"id": "first", "prompt": "p", "responses": ["a"]}, "'first' occurs twice, first at answers.jsonl:1"),
    ],
)
def test_files_without_answers_are_rejected(tmp_path, row, message):
    path = tmp_path / "answers.jsonl"
    first = {"id": "first", "prompt": "p", "responses": ["a"]}
    path.write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(SimpoError, match=message) as raised:
        read_answer_file(path)
    assert str(raised.value).startswith("answers.jsonl:2: ")


def test_a_prompt_may_be_a_single_message(tmp_path):
    message = {"role": "user", "content": "p"}
    (tmp_path / "answers.jsonl").write_text(json.dumps({"id": "x", "prompt": message, "responses": ["a"]}) + "\n")
    assert read_answer_file(tmp_path / "answers.jsonl")["x"]["prompt"] == [message]


def test_metrics_of_both_models_match_values_by_hand():
    """Worked out by hand: two prompts with two answers each."""

    def side(*answers, finished=(True, True)):
        return {"responses": list(answers), "response_ids": [[0] * len(a) for a in answers], "finished": list(finished)}

    contests = [
        PromptAnswers("p", a=side("x", "xx"), b=side("xxx", "x", finished=(True, False))),
        PromptAnswers("q", a=side("xxxx", "xx"), b=side("x", "x")),
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
