"""Pairs from scored responses."""

from __future__ import annotations

import json

import pytest

from simpo import SimpoError
from simpo.sampling.pairs import pair_responses


def write(path, *records):
    lines = [{"id": str(n), "prompt": f"p{n}", "responses": list(responses)} for n, responses in enumerate(records)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_best_against_worst_and_every_prompt_accounted_for(tmp_path):
    """Scores are lengths: of the longest two the first is taken, of the shortest two as well."""
    file = write(tmp_path / "r.jsonl", ["bb", "dddd", "a", "eeee", "c"], ["x", "x"], ["x", "y"], ["one"], ["ab", "abc"])
    report = pair_responses(file, lambda prompt, response: float(len(response)), tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(row["id"], row["chosen"], row["rejected"]) for row in rows] == [("0", "dddd", "a"), ("4", "abc", "ab")]
    assert (rows[0]["chosen_score"], rows[0]["rejected_score"], rows[0]["prompt"]) == (4.0, 1.0, "p0")
    assert (report.prompts, report.pairs) == (5, 2)
    assert report.dropped == {"its responses are all the same": 2, "its responses are all equally good": 1}
    assert report.lines()[0] == "pairs: 2 of 5 prompts"


def test_the_scorer_sees_the_prompt(tmp_path):
    file = write(tmp_path / "r.jsonl", ["0", "1"], ["0", "1"])
    pair_responses(file, lambda prompt, response: float(prompt == f"p{response}"), tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == ["0", "1"]


@pytest.mark.parametrize("content", [None, "", '{"id": "0", "prompt": "p", "responses": ["a"]}\n', "{]\n"])
def test_no_pairs_is_an_error(content, tmp_path):
    file = tmp_path / "r.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SimpoError, match=r"r\.jsonl"):
        pair_responses(file, lambda prompt, response: 0.0, tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()
    assert file.exists() == (content is not None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scorer_must_give_numbers(bad, tmp_path):
    file = write(tmp_path / "r.jsonl", ["a", "b"])
    with pytest.raises(SimpoError, match="prompt 0: the scorer gave"):
        pair_responses(file, lambda prompt, response: bad if response == "b" else 1.0, tmp_path / "pairs.jsonl")
