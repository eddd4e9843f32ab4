from __future__ import annotations

import pytest

from simpo.data.formats import read_comparison
from simpo.data.rows import BadRow, UnknownShape


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = [user("Hi?")]
EXPECTED = (PROMPT, (assistant("A"), assistant("B")))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {
            "prompt": PROMPT,
            "chosen": [user("Hi?"), assistant("A")],
            "rejected": [user("Hi?"), assistant("B")],
        },
        {"chosen": [user("Hi?"), assistant("A")], "rejected": [user("Hi?"), assistant("B")]},
        {"prompt": "Hi?", "chosen": [user("Hi?"), assistant("A")], "rejected": [user("Hi?"), assistant("B")]},
        {"prompt": "Hi?", "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"prompt": PROMPT, "chosen": "A", "rejected": "B"},
        {"prompt": None, "chosen": [user("Hi?"), assistant("A")], "rejected": [user("Hi?"), assistant("B")]},
        {
            "chosen": [{**user("Hi?"), "name": None}, assistant("A")],
            "rejected": [user("Hi?"), {**assistant("B"), "tool_calls": None}],
        },
    ],
    ids=[
        "last turn",
        "transcripts",
        "no prompt",
        "ultrafeedback",
        "text prompt",
        "text",
        "null prompt",
        "arrow",
    ],
)
def test_conversations_in_every_format_are_read(row):
    comparison = read_comparison(row, "here")
    assert (comparison.prompt, comparison.responses) == EXPECTED
    assert (comparison.where, comparison.extra) == ("here", {})


def test_shared_turns_belong_to_the_prompt():
    turns = [SYSTEM, user("1"), assistant("2"), user("3")]
    comparison = read_comparison({"chosen": [*turns, assistant("A")], "rejected": [*turns, assistant("B")]}, "")
    assert comparison.prompt == turns
    parted = read_comparison(
        {"prompt": [SYSTEM], "chosen": [user("1"), assistant("A")], "rejected": [user("1"), assistant("B")]},
        "",
    )
    assert parted.prompt == [SYSTEM, user("1")]


def test_strings_are_read_and_extra_columns_are_kept_apart():
    comparison = read_comparison({"prompt": "p", "chosen": "a", "rejected": "b", "score": 1, "source": None}, "")
    assert (comparison.prompt, comparison.responses) == ("p", ("a", "b"))
    assert comparison.extra == {"score": 1, "source": None}


def test_transcripts_are_split_at_the_last_shared_cue():
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    comparison = read_comparison({"chosen": f"{shared} yes", "rejected": f"{shared} yet\n\nAssistant: no"}, "")
    assert comparison.prompt == shared
    assert comparison.responses == (" yes", " yet\n\nAssistant: no")


def test_rankings_are_best_first_and_ties_keep_their_order():
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 2.5, 1, 2.5], "id": 7}
    comparison = read_comparison(row, "")
    assert comparison.responses == ("b", "d", "a", "c")
    assert (comparison.scores, comparison.extra) == ((2.5, 2.5, 1.0, 1.0), {"id": 7})


def test_rankings_of_conversations_are_read():
    row = {"prompt": PROMPT, "responses": ["B", "A"], "scores": [0, 1]}
    assert (read_comparison(row, "").prompt, read_comparison(row, "").responses) == EXPECTED


HI = [user("Hi?"), assistant("A")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "chosen is null, not text or messages"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "rejected is int, not text or messages"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is int, not text or messages"),
        ({"chosen": "a", "rejected": "b"}, "no prompt column, and the transcripts share no"),
        ({"chosen": HI, "rejected": [user("Hi?")]}, "rejected does not end with an assistant message"),
        ({"chosen": HI, "rejected": [user("Ho?"), assistant("B")]}, "the conversations differ in more than"),
        (
            {"chosen": HI, "rejected": [*HI, user("?"), assistant("B")]},
            "the conversations differ in more than",
        ),
        (
            {"chosen": [assistant("A")], "rejected": [assistant("B")]},
            "the prompt does not end with a user message",
        ),
        (
            {"prompt": [user("Ho?")], "chosen": HI, "rejected": HI},
            "the conversations do not start with the prompt",
        ),
        ({"prompt": PROMPT, "chosen": [], "rejected": HI}, "chosen has no messages"),
        ({"prompt": PROMPT, "chosen": ["A"], "rejected": HI}, "chosen contains something other than messages"),
        (
            {"chosen": [*PROMPT, {"role": "assistant", "content": [{"type": "text"}]}], "rejected": HI},
            "chosen has a content part without text",
        ),
        (
            {"chosen": [*PROMPT, {"role": "assistant", "content": None}], "rejected": HI},
            "chosen has a message whose content is null, not text",
        ),
        ({"prompt": "p", "responses": ["a"], "scores": [1]}, "fewer than two responses"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "responses and scores"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}, "a score is not a number"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "a score is not a number"),
        ({"prompt": "p", "responses": "ab", "scores": [1, 2]}, "responses and scores are not lists"),
        ({"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 1, 1]}, "all scores are equal"),
    ],
)
def test_bad_rows_give_a_reason(row, reason):
    with pytest.raises(BadRow) as caught:
        read_comparison(row, "here")
    assert caught.value.reason.startswith(reason)
    assert not isinstance(caught.value, UnknownShape)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "p", "completion": "c", "label": True}, "unpaired feedback"),
        ({"prompt": "p", "responses": ["a", "b"]}, "responses without scores"),
        ({"prompt": "p", "completion": "c"}, "supervised fine-tuning"),
        ({"messages": []}, "supervised fine-tuning"),
        ({"question": "q", "answer": "a"}, "columns answer, question"),
    ],
)
def test_unknown_formats_list_the_columns(row, hint):
    with pytest.raises(UnknownShape, match=hint):
        read_comparison(row, "here")
