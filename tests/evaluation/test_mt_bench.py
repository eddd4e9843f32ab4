"""MT-Bench: ratings, averages, files, and what the judge is shown."""

from __future__ import annotations

import json

import pytest

from simpo import SimpoError
from simpo.evaluation.answers import Answer, read_answers, write_rows
from simpo.evaluation.mt_bench import MTBench, Rating, RatingPrompts, rating_metrics, read_questions, read_rating


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[8]]", 8.0),
        ("[[7.5]] or rather [[3]]", 7.5),
        ("[4]", 4.0),
        ("[2] comes before [[9]]", 9.0),
        ("as in [2021]", None),
        ("[[rating]]", None),
        ("8", None),
        ("", None),
    ],
)
def test_ratings_are_read_from_text(text, rating):
    assert read_rating(text) == rating


def test_averages_match_their_definition():
    given = {(1, "math"): (8.0, 4.0), (2, "math"): (6.0, None), (3, "writing"): (10.0, 9.0)}
    ratings = [
        Rating(number, category, turn, score)
        for (number, category), scores in given.items()
        for turn, score in enumerate(scores, start=1)
    ]
    notes = []
    found = {metric.name.removeprefix("mt_bench/"): metric for metric in rating_metrics(ratings, notes.append)}
    assert len(notes) == 1 and "1 of 6" in notes[0]
    assert found["turn_1"].value == pytest.approx((8 + 6 + 10) / 3)
    assert found["turn_2"].value == pytest.approx((4 + 9) / 2)
    assert found["average"].value == pytest.approx((8 + 4 + 6 + 10 + 9) / 5)
    assert found["math"].value == pytest.approx((8 + 4 + 6) / 3)
    assert found["writing"].value == pytest.approx(9.5)
    assert (found["average"].n, found["turn_2"].n, found["without_rating"].value) == (3, 2, 1)
    assert found["average"].low < found["average"].value < found["average"].high
    (nothing, missing) = rating_metrics(ratings[3:4], notes.append)
    assert (nothing.value, nothing.n, missing.value) == (None, 0, 1)


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["w1", "w2"], "reference": ["ignored", "ignored"]},
    {"question_id": 111, "category": "math", "turns": ["m1", "m2"], "reference": ["r1", "r2"]},
    {"question_id": 121, "category": "coding", "turns": ["c1", "c2"]},
]


def read(path, questions):
    places = {question.key: question.where for question in questions}
    return read_answers(path, "question_id", MTBench.parse_answer, places)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_only_categories_with_right_answers_use_references(tmp_path):
    file = lines(tmp_path / "question.jsonl", QUESTIONS)
    references = [question.reference for question in read_questions(file, None)]
    assert [one and one.turns for one in references] == [None, ("r1", "r2"), None]
    other = [{"question_id": 121, "choices": [{"turns": ["x1", "x2"]}]}]
    found = read_questions(file, lines(tmp_path / "reference.jsonl", other))
    assert [one.reference and one.reference.turns for one in found] == [None, None, ("x1", "x2")]
    with pytest.raises(SimpoError, match="1 references are for unknown questions, such as 7"):
        read_questions(file, lines(tmp_path / "reference.jsonl", [other[0] | {"question_id": 7}]))


def test_files_can_be_written_and_read_back(tmp_path):
    questions = read_questions(lines(tmp_path / "question.jsonl", QUESTIONS), None)
    answers = [Answer("mine", turns) for turns in (("a", "b"), ("c", "d"), ("e", ""))]
    rows = [MTBench.answer_row(*pair) for pair in zip(questions, answers, strict=True)]
    write_rows(tmp_path / "answers.jsonl", rows)
    assert read(tmp_path / "answers.jsonl", questions) == answers


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 81, "choices": [{"turns": ["a"]}]}], r"answers.jsonl:1: turns: expected 2 texts, got 1"),
        ([{"question_id": 81, "choices": []}], "choices: expected a list with an answer"),
        ([{"choices": [{"turns": ["a", "b"]}]}], "question_id: expected a whole number, got None"),
        ([{"question_id": 81, "choices": [{"turns": ["a", "b"]}]}], "2 of 3 questions have no answer"),
        ([{"question_id": 81, "choices": [{"turns": ["a", "b"]}]}] * 2, "question_id '81' occurs twice"),
    ],
)
def test_answers_not_from_the_benchmark_are_rejected(tmp_path, rows, message):
    questions = read_questions(lines(tmp_path / "question.jsonl", QUESTIONS), None)
    with pytest.raises(SimpoError, match=message):
        read(lines(tmp_path / "answers.jsonl", rows), questions)


def test_the_judge_sees_the_turns_and_the_reference(tmp_path):
    writing, math, _ = read_questions(lines(tmp_path / "question.jsonl", QUESTIONS), None)
    prompts, answer = RatingPrompts(None), Answer("mine", ("A1", "A2"))
    first = prompts.request(writing, answer, 1).messages[1]["content"]
    assert "w1" in first and "A1" in first and "w2" not in first and "A2" not in first
    second = prompts.request(writing, answer, 2).messages[1]["content"]
    assert second.index("w1") < second.index("A1") < second.index("w2") < second.index("A2")
    guided = prompts.request(math, answer, 2)
    assert "r1" in guided.messages[1]["content"] and "r2" in guided.messages[1]["content"]
    assert guided.temperature == 0 and "r1" in prompts.request(math, answer, 1).messages[1]["content"]


def test_custom_prompts_are_used(tmp_path):
    file = tmp_path / "judge_prompts.jsonl"
    file.write_text('{"name": "single-v1", "system_prompt": "s", "prompt_template": "{question}{answer}"}\n')
    with pytest.raises(SimpoError, match="the judge prompt single-v1-multi-turn is missing"):
        RatingPrompts(file)
    file.write_text('{"name": "single-v1", "system_prompt": 1, "prompt_template": "x"}\n')
    with pytest.raises(SimpoError, match="single-v1: system_prompt: expected text, got 1"):
        RatingPrompts(file)
    file.write_text("no\n")
    with pytest.raises(SimpoError, match="not MT-Bench judge prompts"):
        RatingPrompts(file)
