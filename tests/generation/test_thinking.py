"""Reasoning in a judge's reply never decides; reasoning in answers is counted, and shown to judges on request."""

from __future__ import annotations

import pytest

from simpo.client import ChatReply
from simpo.evaluation.academic import final_number
from simpo.evaluation.alpaca_eval import plain_preference
from simpo.evaluation.arena_hard import read_verdict as arena_verdict
from simpo.evaluation.mt_bench import read_rating
from simpo.generation.responses import ResponseText, after_thinking, split_thinking
from simpo.judging.pairwise import read_verdict
from simpo.judging.protocol import ThinkingFilter
from simpo.world.pairs import make_tokenizer

# Replies with reasoning @ and conclusion $, in the formats of many models.
WHOLE = {
    "think": "<think>@</think>\n\n$",
    "thinking": "<thinking>\n@\n</thinking>$",
    "thought": "<thought>@</thought>$",
    "reasoning": "<reasoning>@</reasoning>$",
    "capitals": "<Think>@</THINK>$",
    "without a beginning": "@\n</think>\n$",
    "late beginning": "Let me see. @ <think>@</think>$",
    "twice": "<think>@</think>@<think>@</think>$",
    "nested": "<think>@<think>@</think>@</think>$",
    "another kind inside": "<think>@ <thinking>@</thinking> @</think>$",
    "mistral": "[THINK]@[/THINK]$",
    "seed": "<seed:think>@</seed:think>$",
    "kimi": "◁think▷@◁/think▷$",
    "command": "<|START_THINKING|>@<|END_THINKING|>$",
    "sky": "<|begin_of_thought|>@<|end_of_thought|>$",
    "gemma": "<|channel>thought\n@<channel|>$",
    "gpt-oss": "<|channel|>analysis<|message|>@<|end|><|start|>assistant<|channel|>final<|message|>$<|return|>",
    "gpt-oss with commentary": (
        "<|channel|>analysis<|message|>@<|end|><|start|>assistant<|channel|>commentary to=x<|message|>@<|end|>"
        "<|start|>assistant<|channel|>final <|constrain|>json<|message|>$"
    ),
    "gpt-oss without its tokens": "analysisWell, @ assistantfinal$",
    "nothing": "$",
}
UNFINISHED = [
    "<think>@",
    "<thinking>@",
    "Sure. <think>@",
    "$<think>@",
    "<think>@</think>$<think>@",
    "<think>@ <thinking>@</thinking>$",
    "[THINK]@",
    "<|channel|>analysis<|message|>@",
    "analysisWell, @",
    "<think>",
    "$<think>@</think>",  # reasoned again and said nothing
]
# For each reader: misleading reasoning, a conclusion, and what the conclusion means.
READERS = {
    "pairwise": (lambda text: read_verdict(ChatReply(text, finish_reason="stop")), "Hm: [[B]], [[C]]", "[[A]]", 1.0),
    "arena v0.1": (lambda text: arena_verdict(text, "v0.1"), "Hm: [[B>A]]", "[[A>>B]]", "A>>B"),
    "arena v2": (lambda text: arena_verdict(text, "v2"), "Hm: [[B>A]]", "[[A>>B]]", "A>>B"),
    "mt_bench": (read_rating, "Hm: [[3]] or [2]", "Rating: [[8]]", 8.0),
    "alpaca_eval": (lambda text: {1.0: "m", 2.0: "M"}.get(plain_preference(text)), "M", "m", "m"),
    "gsm8k": (final_number, "Hm, 4. #### 5", "#### 6", 6),
}


def filled(form, thinking, conclusion):
    return form.replace("@", thinking).replace("$", conclusion)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", WHOLE.values(), ids=WHOLE)
def test_the_text_after_the_reasoning_decides(reader, form):
    read, thinking, conclusion, expected = READERS[reader]
    assert read(filled(form, thinking, conclusion)) == expected


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", UNFINISHED)
def test_unfinished_reasoning_has_no_verdict(reader, form):
    read, thinking, conclusion, _ = READERS[reader]
    assert read(filled(form, thinking, conclusion)) is None


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "model_length", "content_filter"])
def test_a_truncated_reply_has_no_verdict(reason):
    reply = ChatReply("[[A]] is what I thought until", finish_reason=reason)
    assert read_verdict(reply) is None and reply.cut_off and reply.complete_text == ""
    assert read_verdict(ChatReply("[[A]]")) == 1.0  # a server that gives no finish reason


def test_a_quoted_verdict_before_the_last_one_is_ignored():
    assert read_verdict(ChatReply('<think>x</think>B says "[[B]]" itself. [[A]]')) == 1.0


@pytest.mark.parametrize(
    "form", [form for name, form in WHOLE.items() if name not in ("nested", "late beginning", "twice")]
)
def test_reasoning_at_the_start_of_an_answer_is_removed(form):
    text = filled(form, "Hm.", "It is 4.\n")
    thinking, answer = split_thinking(text)
    assert answer.strip() == "It is 4." and text.startswith(thinking) and bool(thinking) == (form != "$")


@pytest.mark.parametrize(
    "text",
    [
        "To see it, use the <think> tag.",
        "`re.sub('<think>.*?</think>', '', text)` removes it.",
        "analysis of the text: none",
        "  indented",
        "",
    ],
)
def test_answers_that_mention_reasoning_tags_are_left_alone(text):
    assert split_thinking(text) == ("", text)
    assert ThinkingFilter(True)(text) == text


def test_reasoning_in_answers_is_counted_and_reported():
    texts = ["<think>a</think> one", "two", "<think>never", "x</think>three"]
    notes = []
    for strip, expected in ((True, ["one", "two", "", "three"]), (False, texts)):
        show = ThinkingFilter(strip)
        assert [show(text) for text in texts] == expected
        found = {metric.name: (metric.value, metric.n) for metric in show.metrics("x/", notes.append)}
        assert found == {
            "x/answers_with_thinking": (3, 4),
            "x/answers_without_end_of_thinking": (1, 4),
            "x/answers_stripped_of_thinking": (3 * strip, 4),
        }
    assert len(notes) == 2 and all("3 of 4 answers" in line for line in notes) and "--strip_thinking" in notes[1]
    show = ThinkingFilter(False)
    show("plain")
    assert show.metrics("x/", notes.append) == [] and len(notes) == 2


def test_special_tokens_that_mark_reasoning_are_kept_in_sampled_texts():
    """Without them, the reasoning could not be separated from the answer."""
    tokenizer = make_tokenizer(["a few words"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["[THINK]", "[/THINK]", "<|other|>"]})
    ids = tokenizer("[THINK]a[/THINK]few<|other|>").input_ids
    text = ResponseText(tokenizer).decode([], [*ids, tokenizer.eos_token_id])
    assert text == "[THINK]a[/THINK]few" and split_thinking(text)[1] == "few" == after_thinking(text)
