"""AlpacaEval's files, order randomization, judge and counts."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from simpo import SimpoError
from simpo.client import ChatReply
from simpo.evaluation.alpaca_eval import (
    AlpacaEval,
    AlpacaEvalSettings,
    Annotation,
    PairwisePrompt,
    leaderboard_metrics,
    plain_preference,
    preference,
    read_annotations,
    read_baselines,
    read_reference,
    switched,
    weighted_preference,
    write_annotations,
)
from simpo.evaluation.answers import Answer, Question, read_answers, write_rows

QUESTIONS = [f"Question {number}?" for number in range(12)]


def question(instruction, baseline="theirs"):
    reference = Answer("gpt4_1106_preview", (baseline,))
    return Question(instruction, (instruction,), "reference.json[0]", "helpful_base", reference)


def annotation(instruction, baseline, text, preference, raw=None):
    return Annotation(question(instruction, baseline), Answer("mine", (text,)), "judge", preference, raw)


def read_outputs(path, questions):
    return read_answers(path, "instruction", AlpacaEval.parse_answer, {one.key: one.where for one in questions})


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_half_a_character_is_written_and_read_as_it_was(name, tmp_path):
    rows = [{"instruction": "i", "output": "half \ud800, é"}]
    write_rows(tmp_path / name, rows)
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert "\\ud800" in text and "é" in text
    assert (json.loads(text) if name == "rows.json" else [json.loads(text)]) == rows


def test_the_order_is_drawn_like_the_benchmarks():
    drawn = [switched(question) for question in QUESTIONS]
    for question, found in zip(QUESTIONS, drawn, strict=True):
        assert found is random.Random("is_switched_outputs" + question + "0").choices([False, True])[0]
    assert set(drawn) == {False, True}


def test_the_first_token_is_weighted():
    assert weighted_preference({"m": math.log(0.6), "M": math.log(0.2), "The": -5.0}) == pytest.approx(2 - 0.75)
    assert weighted_preference({"m": -0.1, "The": -3.0}) == 1.0
    assert weighted_preference({"M": -0.69}) == 2.0
    assert (
        math.isnan(weighted_preference({"A": -0.1}))
        and math.isnan(weighted_preference(None))
        and math.isnan(weighted_preference({}))
    )


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({"<think>": 0.99, "m": 0.004, "M": 0.001}, None),  # about to think
        ({"m": 0.3, "M": 0.19, "I": 0.5}, None),
        ({"m": 0.3, "M": 0.21, "I": 0.4}, 2 - 0.3 / 0.51),
        ({" m": 0.6, "M\n": 0.2, "The": 0.1}, 2 - 0.6 / 0.8),
        ({"m": 0.02, " m": 0.2, " M": 0.6}, 2 - 0.22 / 0.82),  # too little probability without leading whitespace
        ({"m": 0.6, " m": 0.1, "M": 0.2}, 2 - 0.6 / 0.8),  # enough without it, so the benchmark ignores the others
        ({"m": 0.1, "M": 0.1, " ": 0.8}, None),
    ],
)
def test_a_verdict_needs_enough_probability_on_its_names(probabilities, expected):
    found = weighted_preference({token: math.log(value) for token, value in probabilities.items()})
    assert math.isnan(found) if expected is None else found == pytest.approx(expected)


def test_an_unweighted_judge_names_an_answer():
    assert [plain_preference("m"), plain_preference(" M\n")] == [1.0, 2.0]
    assert math.isnan(plain_preference("both")) and math.isnan(plain_preference(""))


@pytest.mark.parametrize("weighted", [True, False])
def test_a_verdict_is_swapped_back_if_the_order_was_swapped(weighted):
    """The judge prefers the model's answer wherever it is, then whichever is first."""
    for instruction in QUESTIONS:
        name = "m" if switched(instruction) else "M"
        fair = ChatReply(name, {name: -0.0, "m" if name == "M" else "M": -math.inf})
        assert preference(instruction, fair, weighted=weighted) == 2
        turned = preference(instruction, ChatReply("m", {"m": 0.0}), weighted=weighted)
        assert turned == (2 if switched(instruction) else 1)
    assert math.isnan(preference("q", ChatReply("?", None), weighted=weighted))
    assert preference("q", None, weighted=weighted) == 1.5


def test_a_request_shows_both_answers_in_the_drawn_order():
    prompt = PairwisePrompt(None)
    for instruction in QUESTIONS:
        request = prompt.request(instruction, "one {output_2}", "two", weighted=True)
        assert [message["role"] for message in request.messages] == ["system", "user"]
        text = request.messages[1]["content"]
        assert instruction in text
        assert (text.index("two") < text.index("one {output_2}")) is switched(instruction)
        assert (request.max_tokens, request.temperature, request.top_logprobs) == (1, 1.0, 5)
    assert prompt.request("a", "1", "2", weighted=False).top_logprobs is None


def test_a_custom_prompt_is_used(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text('Which? {"q": """{instruction}"""} {output_1} or {output_2} {else}')
    request = PairwisePrompt(file).request("Q", "A", "A", weighted=True)
    assert request.messages == [{"role": "user", "content": 'Which? {"q": """Q"""} A or A {else}'}]
    assert PairwisePrompt(file).digest != PairwisePrompt(None).digest
    file.write_text("{instruction} {output_1}")
    with pytest.raises(SimpoError, match=r"{output_2}"):
        PairwisePrompt(file)
    file.write_text("<|im_start|>judge\n{instruction} {output_1} {output_2}\n<|im_end|>")
    with pytest.raises(SimpoError, match="'judge' is not a role"):
        PairwisePrompt(file)
    file.write_text("{instruction} {output_1} {output_2}\n<|im_start|>user\nWhich?\n<|im_end|>")
    with pytest.raises(SimpoError, match="text outside its messages"):
        PairwisePrompt(file)


def test_files_can_be_written_and_read_back(tmp_path):
    annotations = [annotation("a", "1", "2", 1.25, "m"), annotation("b", "x", "", math.nan, "?")]
    outputs = tmp_path / "model_outputs.json"
    write_rows(outputs, [AlpacaEval.answer_row(one.question, one.answer) for one in annotations])
    assert read_outputs(outputs, [one.question for one in annotations]) == [one.answer for one in annotations]
    assert [one.category for one in read_reference(outputs)] == ["helpful_base"] * 2
    write_annotations(tmp_path / "annotations.json", annotations)
    rows = json.loads((tmp_path / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == [1.25, None]
    assert {"instruction", "output_1", "output_2", "generator_1", "generator_2", "annotator"} <= rows[0].keys()
    back = read_annotations(tmp_path / "annotations.json")
    answers = [(one.question.key, one.question.reference, one.answer) for one in annotations]
    assert [(one.question.key, one.question.reference, one.answer) for one in back] == answers
    assert back[0].preference == 1.25 and math.isnan(back[1].preference)


def test_a_draw_in_older_versions_is_read_as_a_draw(tmp_path):
    rows = [{"instruction": "a", "output_1": "1", "output_2": "2", "preference": 0}]
    assert read_annotations(write(tmp_path / "old.json", rows))[0].preference == 1.5


ROW = {"instruction": "a", "output": "1"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW], r"outputs.json\[1\]: instruction 'a' occurs twice, first at outputs.json\[0\]"),
        ([{"instruction": "a"}], r"outputs.json\[0\]: no 'output'; the row has instruction"),
        ([{"instruction": "a", "output": 3}], r"output: expected text, got 3"),
        ([ROW], r"1 of 2 questions have no answer; the first is reference.json\[1\] \(instruction 'b'\)"),
        ([ROW, {"instruction": "c", "output": "1"}], r"1 of 2 answers are to questions that are not in.*'c'"),
    ],
)
def test_outputs_not_from_the_benchmark_are_rejected(tmp_path, rows, message):
    reference = read_reference(write(tmp_path / "reference.json", [ROW, ROW | {"instruction": "b"}]))
    with pytest.raises(SimpoError, match=message):
        read_outputs(write(tmp_path / "outputs.json", rows), reference)


@pytest.mark.parametrize("value", [3, 0.5, "m", True])
def test_a_preference_must_be_between_1_and_2(tmp_path, value):
    rows = [{"instruction": "a", "output_1": "1", "output_2": "2", "preference": value}]
    with pytest.raises(SimpoError, match=r"rows.json\[0\]: preference: expected a number from 1 to 2"):
        read_annotations(write(tmp_path / "rows.json", rows))


def test_baselines_are_read_from_files(tmp_path):
    gamed = "model,index,std_delta_len,instruction_difficulty,not_gamed_baseline,preference\n"
    gamed += "verbose,0,-1.0,0.5,False,0.8\nverbose,1,0.25,-2.0,False,0.1\n"
    (tmp_path / "gamed.csv").write_text(gamed)
    found = read_baselines(tmp_path / "gamed.csv", None)
    assert found.x == pytest.approx(np.array([[math.tanh(-1), 0.5, 0], [math.tanh(0.25), -2, 0]]))
    assert (found.y.tolist(), found.difficulties.tolist()) == ([0.8, 0.1], [0.5, -2.0])
    (tmp_path / "difficulty.csv").write_text("index,instruction_difficulty\n1,7.5\n0,1.5\n")
    assert read_baselines(tmp_path / "gamed.csv", tmp_path / "difficulty.csv").difficulties.tolist() == [1.5, 7.5]
    (tmp_path / "difficulty.csv").write_text("index,instruction_difficulty\n1,7.5\n3,1.5\n")
    with pytest.raises(SimpoError, match="index: expected numbers from 0"):
        read_baselines(tmp_path / "gamed.csv", tmp_path / "difficulty.csv")
    (tmp_path / "gamed.csv").write_text(gamed.replace("0.1\n", "1.1\n"))
    with pytest.raises(SimpoError, match=r"gamed.csv row 1: preference: expected a number from 0 to 1"):
        read_baselines(tmp_path / "gamed.csv", None)
    (tmp_path / "gamed.json").write_text(f'[{{"index": 0, "std_delta_len": 1{"0" * 400}}}]')
    with pytest.raises(SimpoError, match="std_delta_len: expected a number"):
        read_baselines(tmp_path / "gamed.json", None)
    (tmp_path / "gamed.csv").write_text("index,preference\n0,0.5\n")
    with pytest.raises(SimpoError, match="std_delta_len: expected a number"):
        read_baselines(tmp_path / "gamed.csv", None)


def test_difficulties_for_other_instructions_are_rejected_or_reported(tmp_path):
    (tmp_path / "gamed.csv").write_text(
        "index,std_delta_len,instruction_difficulty,preference\n0,1.0,0.5,0.8\n1,0.2,-2.0,0.1\n"
    )
    settings = AlpacaEvalSettings(annotations=tmp_path / "gamed.csv", output_dir=tmp_path, gamed=tmp_path / "gamed.csv")
    notes = []
    assert len(settings.length_control(2, notes.append).difficulties) == 2 and not notes
    settings.length_control(1, notes.append)
    assert len(notes) == 1 and "by position" in notes[0]
    with pytest.raises(SimpoError, match="3 instructions, but difficulties for 2 only"):
        settings.length_control(3, notes.append)


def test_missing_and_empty_answers_are_counted():
    found = [
        annotation(instruction, "theirs", text, value)
        for instruction, text, value in zip(
            QUESTIONS, ["ours", "", " ", "abcdef"], [2.0, 1.0, math.nan, 1.5], strict=False
        )
    ]
    notes = []
    metrics = {
        metric.name.removeprefix("alpaca_eval/"): metric for metric in leaderboard_metrics(found, None, notes.append)
    }
    assert metrics["win_rate"].value == pytest.approx(50) and metrics["win_rate"].n == 3
    assert metrics["without_preference"].value == 1 and metrics["empty_answers"].value == 2
    assert metrics["avg_length"].value == int((4 + 0 + 1 + 6) / 4) == 2
    assert "length_controlled_winrate" not in metrics
    assert [line.split()[1] for line in notes] == ["1", "2"]
    (nothing, *_) = leaderboard_metrics(found[2:3], None, notes.append)
    assert (nothing.name, nothing.value, nothing.n) == ("alpaca_eval/win_rate", None, 0)


def test_the_interval_of_a_win_rate_is_wilsons_with_1_96_standard_errors():
    """A share of 0.6 with the standard error of n trials has the Wilson interval for n trials."""
    found = [annotation(text, "theirs", "ours", value) for text, value in zip("abcde", [2, 2, 2, 1, 1], strict=True)]
    metric = next(one for one in leaderboard_metrics(found, None, print) if one.name == "alpaca_eval/win_rate")
    trials = 0.6 * 0.4 / (np.std([1, 1, 1, 0, 0], ddof=1) ** 2 / 5)
    z = 1.96
    centre = (0.6 + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(0.24 / trials + z**2 / (4 * trials**2))
    assert (metric.low, metric.high) == pytest.approx((100 * (centre - half), 100 * (centre + half)))
