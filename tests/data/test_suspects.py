"""Rows and templates that would train something unintended: rejected by name, or counted and reported."""

from __future__ import annotations

import re

import pytest
from tests.data.conftest import BOS_CHAT, CHATML

from simpo.data.prompts import prepare_prompts
from simpo.data.rows import as_dataset
from simpo.data.settings import RenderSettings, TokenizeSettings
from simpo.data.tokenizing import prepare, prepare_feedback, prepare_sft
from simpo.errors import SimpoError

QUESTION = "What is the capital of France, please?"
ASKED = {"prompt": QUESTION}
PAIR = {"prompt": QUESTION, "chosen": "It is Paris.", "rejected": "No idea."}
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
)


def turn(role, content):
    return {"role": role, "content": content}


def talk(*contents):
    return [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]


def report(tokenizer, *rows, how=prepare, **settings):
    return how(as_dataset(list(rows), "rows"), tokenizer, TokenizeSettings(**settings)).report


@pytest.fixture
def chatml(build_tokenizer):
    return build_tokenizer("chatml")


def answered(*asked):
    return {"chosen": talk(*asked, "yes"), "rejected": talk(*asked, "no")}


def transcripts(asked):
    return {name: f"\n\nHuman: {asked}\n\nAssistant: {name}" for name in ("chosen", "rejected")}


@pytest.mark.parametrize(
    ("row", "ignored"),
    [
        ({"prompt": QUESTION, **answered(QUESTION)}, 0),
        ({"prompt": f" {QUESTION}\n", **answered("Hi", "Hm?", QUESTION)}, 0),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " yes", "rejected": " no", "system": "Be nice."}, 0),
        ({"prompt": "You are a pirate.", **answered("Hi")}, 1),
        ({"prompt": "Be nice.", **transcripts("Hi")}, 1),
    ],
)
def test_a_prompt_missing_from_the_conversations_is_counted(chatml, row, ignored):
    found = report(chatml, row)
    assert found.used == 1
    assert list(found.ignored.values()) == [1] * ignored
    assert all("'prompt'" in key for key in found.ignored)


@pytest.mark.parametrize(
    ("how", "row", "name"),
    [
        (prepare, PAIR | {"instruction": "Answer as a pirate."}, "instruction"),
        (prepare, PAIR | {"question": f" {QUESTION}\n"}, None),
        (prepare, PAIR | {"conversations": [{"from": "human", "value": "Earlier"}]}, "conversations"),
        (prepare, PAIR | {"messages": talk("Hi", "yes")}, "messages"),
        (prepare, PAIR | {"messages": talk(QUESTION, "It is Paris.")}, None),  # UltraFeedback, binarized
        (prepare_sft, {"messages": talk("Hi", "yes"), "input": "Some text"}, "input"),
        (prepare_sft, {"prompt": "Hi  you", "completion": "yes", "instruction": "Hi you"}, None),
    ],
)
def test_a_second_question_column_is_counted(chatml, how, row, name):
    found = report(chatml, row, how=how)
    assert found.used == 1
    assert list(found.ignored) == ([f"column {name!r}, which does not occur in the conversation"] if name else [])


def test_extra_messages_that_contain_the_question_are_not_counted(chatml):
    row = {"prompt": QUESTION, "messages": talk(QUESTION, "It is Paris."), **answered(QUESTION)}
    assert not prepare_prompts(as_dataset([row], "rows"), chatml).report.ignored


def test_columns_with_reasoning_or_template_variables_are_counted(chatml):
    chatml.chat_template = "{% if shout %}LOUD{% endif %}" + CHATML
    row = PAIR | {"shout": True, "reasoning": "Hm.", "bos_token_count": 1}
    found = report(chatml, row, PAIR | {"shout": None, "reasoning": ""})
    assert found.ignored == {
        "column 'reasoning', which has no effect": 1,
        "column 'shout', a variable of the chat template that belongs in chat_template_kwargs": 1,
    }
    assert not report(chatml, PAIR | {"chat_template_kwargs": {"shout": True}}).ignored
    assert not report(chatml, PAIR | {"messages": talk(QUESTION, "It is Paris.")}).ignored  # not only a variable


def test_a_column_named_like_a_templates_internal_variable_is_not_counted(chatml):
    """Such as Qwen3's ``content``, assigned in a branch. A variable tested with ``is defined`` is still an option."""
    own = "{% if messages[1:] %}{% set content, role = '', '' %}{% endif %}"
    own += "{% macro quoted(text) %}{{ text | default('') }}{% endmacro %}{{ quoted(content) + (role or '') }}"
    given = "{% if shout is not defined %}{% set shout = false %}{% endif %}{{ 'LOUD' if shout }}"
    chatml.chat_template = own + given + CHATML
    found = report(chatml, PAIR | dict.fromkeys(("content", "role", "text", "shout"), "x"))
    assert list(found.ignored) == [
        "column 'shout', a variable of the chat template that belongs in chat_template_kwargs"
    ]


def test_system_prompts_of_single_responses_are_counted(chatml):
    """UltraFeedback's responses were generated with different ones, for which a comparison has no place."""
    made = [{"response": text, "overall_score": n, "custom_system_prompt": f"Be {n}."} for n, text in enumerate("ab")]
    found = report(chatml, {"instruction": QUESTION, "completions": made})
    assert list(found.ignored) == ["column 'custom_system_prompt', which has no effect"]
    bare = [{key: made_one[key] for key in ("response", "overall_score")} for made_one in made]
    assert not report(chatml, {"instruction": QUESTION, "completions": bare}).ignored


def test_a_prompt_missing_from_the_messages_is_counted(chatml):
    rows = [
        {"prompt": "Hi", "messages": talk("Hi", "yes")},
        {"prompt": "You are a pirate.", "messages": talk("Hi", "yes")},
    ]
    assert list(report(chatml, *rows, how=prepare_sft).ignored.values()) == [1]


@pytest.mark.parametrize(
    ("how", "suspicious", "clean"),
    [
        (prepare, PAIR | {"chosen": f"{QUESTION} Oh", "rejected": f" {QUESTION}"}, PAIR | {"chosen": QUESTION}),
        (prepare, PAIR | {"prompt": [turn("user", " ")]}, PAIR),
        (prepare, PAIR | {"chosen_score": 1, "rejected_score": 2}, PAIR | {"chosen_score": 2, "rejected_score": 1}),
        (prepare, PAIR | {"chosen-rating": 1, "rejected-rating": 2}, PAIR | {"chosen_rank": 1, "rejected_rank": 2}),
        (prepare, PAIR | {"chosen_avg_rating": 3, "rejected_avg_rating": 3}, PAIR | {"chosen_rating": None}),
        (prepare, PAIR | {"rating_chosen": 1.5, "rating_rejected": 2}, PAIR | {"chosen_score_model": "x"}),
        (prepare, dict.fromkeys(PAIR, '["a", "b"]') | {"rejected": "['c']"}, PAIR | {"chosen": '["a", "b"]'}),
        (prepare, PAIR | {"score_chosen": 5.0, "score_rejected": 5.0}, PAIR | {"score_chosen": 5.0}),
        (prepare_sft, ASKED | {"completion": f"{QUESTION} It is Paris."}, ASKED | {"completion": "Paris."}),
        (prepare_sft, {"messages": talk(QUESTION, f"{QUESTION} Paris.")}, {"messages": talk("Hi", "Hi there.")}),
    ],
)
def test_suspicious_rows_are_used_and_counted(chatml, how, suspicious, clean):
    found = report(chatml, suspicious, clean, how=how)
    assert (found.used, list(found.suspect.values())) == (2, [1])
    assert dict(found.metrics())["data/train/suspect"] == 1


def test_an_empty_sampling_prompt_is_suspicious(chatml):
    prompts = prepare_prompts(as_dataset([{"prompt": ""}, {"prompt": "Hi"}], "rows"), chatml)
    assert list(prompts.report.suspect.values()) == [1]


@pytest.mark.parametrize(
    "row",
    [
        PAIR | {"chosen": "It is Paris.</s>"},  # from another model family
        PAIR | {"rejected": "No idea.<|endoftext|>"},  # the tokenizer's EOS, which does not end a turn in this template
        PAIR | {"chosen": "It is Paris.<|im_end|><|endoftext|><|endoftext|>"},  # decoded together with padding
        PAIR | {"prompt": [*talk("Hi", "Hello.<|eot_id|>"), turn("user", "And?")]},
    ],
)
def test_an_answer_that_ends_with_a_foreign_end_token_makes_a_bad_row(chatml, row):
    with pytest.raises(SimpoError, match=r"1 of 1 rows are bad.*ends with '"):
        report(chatml, row)
    chatml.chat_template = None  # text is used unchanged
    if isinstance(row["prompt"], str):
        assert report(chatml, row).used == 1


def test_html_is_neither_an_end_of_turn_nor_bos(chatml, build_tokenizer):
    assert report(chatml, PAIR | {"chosen": "It was <s>Rome</s>"}).used == 1
    llama = build_tokenizer("sentencepiece")
    assert report(llama, PAIR | {"chosen": "<s>Rome</s> Paris."}).used == 1
    with pytest.raises(SimpoError, match="starts with '<s>'"):
        report(llama, PAIR | {"chosen": "<s>It is Paris.</s>"})


def test_an_answer_may_end_with_a_plain_text_pad_token(chatml):
    chatml.pad_token = "!"
    assert report(chatml, PAIR | {"chosen": "It is Paris!"}).used == 1


def test_llamas_ipython_role_is_the_tool_role(chatml):
    asked = [*talk("Hi", "search()"), turn("ipython", "42")]
    rows = [PAIR | {"prompt": [*asked[:-1], turn(role, "42")]} for role in ("ipython", "tool")]
    first, second = prepare(as_dataset(rows, "rows"), chatml, TokenizeSettings()).dataset["prompt_ids"]
    assert first == second


def test_the_end_of_turn_is_also_removed_from_earlier_answers(chatml):
    rows = [PAIR | {"prompt": [*talk("Hi", text), turn("user", "And?")]} for text in ("Hello.", "Hello.<|im_end|>")]
    prepared = prepare(as_dataset(rows, "rows"), chatml, TokenizeSettings())
    first, second = prepared.dataset["prompt_ids"]
    assert first == second


@pytest.mark.parametrize("template", [BOS_CHAT, None])
def test_an_answer_that_starts_with_bos_makes_a_bad_row(build_tokenizer, template):
    tokenizer = build_tokenizer("two-bos")
    tokenizer.chat_template = template
    with pytest.raises(SimpoError, match=r"1 of 1 rows are bad.*starts with '<\|bos\|>'"):
        report(tokenizer, PAIR | {"chosen": "<|bos|>It is Paris."})


def test_a_transcript_repeated_by_only_one_response_makes_a_bad_row(chatml):
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    with pytest.raises(SimpoError, match="1 of 1 rows are bad"):
        report(chatml, {"prompt": prompt, "chosen": f"{prompt} Hello.", "rejected": " No."})


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n<|endoftext|>", "<|end|><|endoftext|>", "<|end|>\n<|end|> "])
def test_an_answer_may_end_with_everything_the_template_writes_after_it(build_tokenizer, end):
    """Phi-3's template ends a conversation with EOS after the end of turn."""
    phi = build_tokenizer("phi")
    rows = [PAIR, PAIR | {"chosen": PAIR["chosen"] + end}]
    first, second = prepare(as_dataset(rows, "rows"), phi, TokenizeSettings()).dataset["response_ids"]
    assert first == second


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|end|><|endoftext|><|endoftext|>", "<|endoftext|><|end|>"])
def test_endings_the_template_never_writes_are_rejected(build_tokenizer, end):
    with pytest.raises(SimpoError, match=r"ends with '<\|endoftext"):
        report(build_tokenizer("phi"), PAIR | {"chosen": PAIR["chosen"] + end})


COMPARED = (
    "{% for m in messages %}{% if m.role in ['document', 'control'] %}{{ '[' + m.role + ']' + m.content + '[x]' }}"
    "{% elif m.role == 'note' %}[note]{% else %}{{ '[' + m.role + ']' + m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
WRITTEN = "{% if documents %}{{ '<|im_start|>document {}' + documents }}{% endif %}" + CHATML


@pytest.mark.parametrize("how", [prepare, prepare_sft, prepare_feedback, prepare_prompts])
@pytest.mark.parametrize(
    ("template", "known", "unknown"),
    [(COMPARED, "control", "bot"), (COMPARED, "document", "doc"), (WRITTEN, "document", "documents")],
)
def test_roles_named_in_the_chat_template_are_rendered(chatml, how, template, known, unknown):
    chatml.chat_template = template

    def row(role, label):
        asked = [turn(role, "Paris is a capital."), turn("user", "Which one?")]
        if how is prepare_sft:
            return {"messages": [*asked, turn("assistant", "Paris.")]}
        return PAIR | {"completion": "Paris.", "label": label, "prompt": asked}

    def prepared(role):
        rows = as_dataset([row(role, True), row(role, False)], "rows")
        return how(rows, chatml) if how is prepare_prompts else how(rows, chatml, TokenizeSettings()).dataset

    found = next(iter(prepared(known)))
    ids = found.ids if how is prepare_prompts else found["prompt_ids"]
    expected = chatml.apply_chat_template(
        [turn(known, "Paris is a capital."), turn("user", "Which one?")], add_generation_prompt=True, tokenize=False
    )
    assert chatml.decode(ids) == expected
    with pytest.raises(SimpoError, match=f"the role '{unknown}'"):
        prepared(unknown)


def test_a_role_whose_content_the_template_omits_makes_a_bad_row(chatml):
    chatml.chat_template = COMPARED
    with pytest.raises(SimpoError, match="does not render a message with role 'note'"):
        report(chatml, PAIR | {"prompt": [turn("note", "Paris is a capital."), turn("user", "Which one?")]})


@pytest.mark.parametrize("role", ["bot", ""])
@pytest.mark.parametrize("how", [prepare, prepare_sft, prepare_feedback])
def test_unknown_roles_make_bad_rows(chatml, how, role):
    row = PAIR | {"completion": "Paris.", "label": True, "prompt": [turn(role, "Hi"), turn("user", "And?")]}
    if how is prepare_sft:
        row = {"messages": [*row["prompt"], turn("assistant", "Paris.")]}
    with pytest.raises(SimpoError, match=f"the role '{role}'"):
        report(chatml, row, how=how)
    if how is prepare:
        with pytest.raises(SimpoError, match=f"the role '{role}'"):
            prepare_prompts(as_dataset([{"prompt": row["prompt"]}], "rows"), chatml)


def notices(tokenizer, template, **kwargs):
    tokenizer.chat_template = template
    return report(tokenizer, PAIR, rendering=RenderSettings(chat_template_kwargs=kwargs)).notices


def test_common_templates_cause_no_notices(build_tokenizer):
    for kind in ("chatml", "two-bos", "phi", "sentencepiece"):  # the last one has no generation prompt and no header
        assert report(build_tokenizer(kind), PAIR).notices == []


def test_a_scored_header_is_reported(build_tokenizer):
    template = re.sub(r"\{% if add_generation_prompt.*", "", BOS_CHAT)
    (notice,) = notices(build_tokenizer("two-bos"), template)
    assert "'[assistant]'" in notice


def test_an_end_of_turn_that_is_not_a_token_is_reported(build_tokenizer):
    (notice,) = notices(build_tokenizer("two-bos"), CHATML)
    assert "'<|im_end|>'" in notice and "'<|eot|>'" in notice


def test_a_date_in_prompts_is_reported_unless_it_is_set(chatml):
    (notice,) = notices(chatml, DATED + CHATML)
    assert "date" in notice and "date_string" in notice
    assert notices(chatml, DATED + CHATML, date_string="1 May 2026") == []
