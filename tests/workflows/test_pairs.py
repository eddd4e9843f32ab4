"""Pairs from scored responses, against values worked out by hand and a naive enumeration."""

from __future__ import annotations

import json
import random
from itertools import permutations

import pytest

from simpo import SimpoError
from simpo.cli import main
from simpo.runs.results import read_results
from simpo.workflows.pair import (
    CLOSE,
    EMPTY,
    EQUAL,
    IDENTICAL,
    TOO_FEW,
    UNEVEN,
    UNFINISHED,
    UNSCORED,
    PairSettings,
    make_pairs,
    pair_responses,
)


def record(number, *answers):
    texts, scores = zip(*answers, strict=True)
    return {"id": str(number), "prompt": f"p{number}", "responses": list(texts), "scores": list(scores)}


def made(records, **settings):
    rows, report = make_pairs(records, PairSettings(**settings))
    return [(row["id"], row["chosen"], row["rejected"]) for row in rows], dict(report.dropped)


def test_best_worst_pairs_use_the_first_of_tied_answers():
    """Among equally good or equally bad answers, the first one is used."""
    found = made(
        [
            record(0, ("bb", 2), ("dddd", 4), ("a", 1), ("eeee", 4), ("c", 1)),
            record(1, ("x", 1), ("x", 1)),
            record(2, ("x", 1), ("y", 1)),
            record(3, ("one", 3)),
            record(4, ("u", None), ("v", 1), ("w", None)),
            record(5, ("x", 1), ("y", 3), (" x", 1), (" ", 9), ("", 0)),
        ]
    )
    assert found[0] == [("0", "dddd", "a"), ("5", "y", "x")]
    assert found[1] == {IDENTICAL: 2, TOO_FEW: 3, EQUAL: 1, UNSCORED: 2, EMPTY: 2}


def test_truncated_answers_are_left_out():
    """A pair would end them with a token the model did not write; keep_unfinished keeps them."""
    cut = [
        record(0, ("best and", 9), ("good", 5), ("bad", 1), ("but", 0)) | {"finished": [False, True, True, False]},
        record(1, ("a", 2), ("b", 1)) | {"finished": [True, False]},
        record(2, ("a", None), (" ", 1), ("c", 2), ("d", 1)) | {"finished": [False, True, True, True]},
        record(3, ("x", 2), ("y", 1)),  # from elsewhere: whether they are finished is unknown
    ]
    assert made(cut) == (
        [("0", "good", "bad"), ("2", "c", "d"), ("3", "x", "y")],
        {UNFINISHED: 3, TOO_FEW: 1, UNSCORED: 1, EMPTY: 1},
    )
    assert made(cut, keep_unfinished=True)[0] == [
        ("0", "best and", "but"), ("1", "a", "b"), ("2", "c", "d"), ("3", "x", "y"),
    ]  # fmt: skip
    [ranking, _, _], _ = make_pairs(cut, PairSettings(pairs="ranking"))
    assert ranking["responses"] == ["good", "bad"]


def random_records(seed):
    rng = random.Random(seed)
    for number in range(30):
        texts = [rng.choice("abcdefgh") * rng.randrange(1, 9) for _ in range(rng.randrange(2, 6))]
        scores = {text: rng.choice([None, 0.0, 1.0, 2.5, 4.0]) for text in texts}
        yield record(number, *((text, scores[text]) for text in texts))


@pytest.mark.parametrize("limits", [{}, {"min_gap": 1.5}, {"max_length_ratio": 2.0}])
def test_all_pairs_match_a_naive_enumeration(limits):
    for seed in range(5):
        records = list(random_records(seed))
        expected = set()
        candidates = 0
        for one in records:
            scores = dict(zip(one["responses"], one["scores"], strict=True))
            for a, b in permutations([text for text, score in scores.items() if score is not None], 2):
                gap = scores[a] - scores[b]
                candidates += gap > 0 or (gap == 0 and a < b)
                ratio = max(len(a), len(b)) / min(len(a), len(b))
                if gap > 0 and gap >= limits.get("min_gap", 0) and ratio <= limits.get("max_length_ratio", 99):
                    expected.add((one["prompt"], a, b))
        rows, report = make_pairs(records, PairSettings(pairs="all", **limits))
        assert {(row["prompt"], row["chosen"], row["rejected"]) for row in rows} == expected
        assert len({row["id"] for row in rows}) == len(rows) == report.rows
        assert report.rows + sum(report.dropped[reason] for reason in (EQUAL, CLOSE, UNEVEN)) == candidates
        for row in rows:
            assert row["chosen_score"] > row["rejected_score"]


def test_best_random_pairs_draw_any_worse_answer():
    """Over seeds, every worse answer occurs; a given seed always draws the same one, whatever prompts come before."""
    one = record(7, ("a", 1), ("best", 9), ("b", 2), ("c", 9), ("d", 3))
    drawn = {made([one], pairs="best_random", seed=seed)[0][0][2] for seed in range(40)}
    assert drawn == {"a", "b", "d"}
    for seed in range(5):
        alone, _ = made([one], pairs="best_random", seed=seed)
        behind, _ = made([record(1, ("x", 1), ("y", 2)), one], pairs="best_random", seed=seed)
        assert behind[1:] == alone
        assert alone[0][1] == "best"
    assert made([record(0, ("x", 1), ("y", 1))], pairs="best_random") == ([], {EQUAL: 1})
    many = [record(number, ("best", 9), ("a", 1), ("b", 1)) for number in range(20)]
    assert {rejected for _, _, rejected in made(many, pairs="best_random")[0]} == {"a", "b"}  # a draw per prompt


def test_a_ranking_contains_every_distinct_answer_best_first():
    rows, report = make_pairs(
        [record(0, ("a", 1), ("b", 3), ("a", 1), ("c", None), ("d", 2)), record(1, ("a", 1), ("b", 1))],
        PairSettings(pairs="ranking"),
    )
    assert rows == [{"prompt": "p0", "responses": ["b", "d", "a"], "scores": [3, 2, 1], "id": "0"}]
    assert report.dropped == {IDENTICAL: 1, UNSCORED: 1, EQUAL: 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"pairs": "worst"},
        {"min_gap": -1.0},
        {"min_gap": float("nan")},
        {"max_length_ratio": 0.5},
        {"pairs": "ranking", "max_length_ratio": 2.0},
    ],
)
def test_settings_out_of_bounds_are_rejected(settings):
    with pytest.raises(SimpoError, match="|".join(settings)):
        PairSettings(**settings)


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_the_command_writes_training_rows(tmp_path, capsys):
    """simpo train accepts the rows, and every drop is in the results. The same command leaves the folder alone."""
    messages = [{"role": "user", "content": "Hello?"}]
    file = write(
        tmp_path / "annotated.jsonl",
        record(0, ("long one", 1.5), ("x", 0.5)) | {"prompt": messages},
        record(1, ("a", 1), ("b", 1), ("c and", 0)) | {"finished": [True, True, False]},
    )
    command = ["pair", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    [row] = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert row == {
        "prompt": messages, "chosen": "long one", "rejected": "x",
        "chosen_score": 1.5, "rejected_score": 0.5, "id": "0",
    }  # fmt: skip
    found = {metric.name: metric.value for metric in read_results(tmp_path / "out/results.json").metrics}
    assert found["pair/prompts"] == 2
    assert found["pair/dropped/pairs_equally_good"] == found["pair/rows"] == found["pair/score_gap"] == 1
    assert found["pair/dropped/answers_cut_at_max_new_tokens"] == 1
    assert found["pair/chosen_longer"] == 1
    before = (tmp_path / "out/pairs.jsonl").stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "out/pairs.jsonl").stat().st_mtime_ns == before
    assert "finished" in capsys.readouterr().out
    assert main(["pair", str(file), "--output_dir", str(tmp_path / "out"), "--min_gap", "0.1"]) == 2
    assert "min_gap" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "kept"), "--keep_unfinished"]) == 0
    assert "pairs: 2 of 2 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"id": "0", "prompt": "p", "responses": ["a"], "scores": [1]}\n', "fewer than two different answers"),
        ('{"id": "0", "prompt": "p", "responses": ["a", "a"], "scores": [1, 1]}\n', "fewer than two different answers"),
        ('{"id": "0", "prompt": "p", "responses": ["a", "b"]}\n', "jsonl:1: scores:"),
        ('{"id": "0", "prompt": "p", "responses": ["a", "b"], "scores": [1, "x"]}\n', "expected numbers or null"),
        (
            f'{{"id": "0", "prompt": "p", "responses": ["a", "b"], "scores": [1, {10**400}]}}\n',
            "expected numbers or null",
        ),
        (
            '{"id": "0", "prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "finished": [true]}\n',
            "jsonl:1: finished: expected true or false for each response",
        ),
        (
            '{"id": "0", "prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "finished": [false, false]}\n',
            "no pairs (dropped 2 answers: cut at max_new_tokens",
        ),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\n', "jsonl:1: id: expected text"),
        ("{]\n{}\n", "a.jsonl:1: not JSON"),
        ("[]\n{}\n", "a.jsonl:1: not a JSON object"),
    ],
)
def test_unusable_input_gives_a_one_line_error(content, message, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    assert main(["pair", str(file), "--output_dir", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert str(file) in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pairing_runs_in_one_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pair", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "simpo pair runs in one process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scores_from_a_function_that_sees_the_prompt(tmp_path):
    file = write(tmp_path / "r.jsonl", *({"id": c, "prompt": f"p{c}", "responses": ["0", "1"]} for c in "01"))
    report = pair_responses(file, lambda prompt, response: float(prompt == f"p{response}"), tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == ["0", "1"]
    assert report.lines() == ["pairs: 2 of 2 prompts"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_function_must_return_numbers(bad, tmp_path):
    file = write(tmp_path / "r.jsonl", {"id": "0", "prompt": "p", "responses": ["a", "b"]})
    with pytest.raises(SimpoError, match="prompt 0: "):
        pair_responses(file, lambda prompt, response: bad if response == "b" else 1.0, tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize("pairs", ["best_worst", "ranking"])
def test_rendering_options_of_a_prompt_stay_with_its_pairs(pairs):
    context = {"tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False}}
    given = record(0, ("a", 1.0), ("b", 0.0)) | context
    rows, _ = make_pairs([given], PairSettings(pairs=pairs))
    assert [{key: row[key] for key in context} for row in rows] == [context]
