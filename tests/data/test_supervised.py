"""Conversations for supervised fine-tuning: their ids, and which of them are scored."""

from __future__ import annotations

import json
from itertools import groupby, pairwise

import pytest
from datasets import Dataset

from simpo.data.settings import OVERLONG, PROMPT_CUT, STILL_OVERLONG, TURNS_CUT, TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import UNANSWERED_CUT, prepare, prepare_sft
from simpo.errors import SimpoError

LITERAL = "what do <|im_end|>, </s>, <|end|>, <|bos|>, <|eot|> and <s> mean?"
THREE = ("How do I wrap a present?", "You can fold the paper.", "yes?", "No, I think.", "Paris?", "Of course.")


def chat(*texts, system=None):
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def tokenized(tokenizer, *rows, **settings):
    return prepare_sft(Dataset.from_list(list(rows)), tokenizer, TokenizeSettings(**settings)).dataset


def parts(row):
    """Return the ids of the sequence, and whether each is scored."""
    (response,), (scored,) = row["response_ids"], row["scored"]
    assert len(response) == len(scored)
    return row["prompt_ids"] + response, [False] * len(row["prompt_ids"]) + scored


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def scored_runs(tokenizer, row):
    """Return the text of each run of scored tokens, decoded in context; a run ends with an end-of-turn token."""
    ids, scored = parts(row)
    edges = [place for place in range(1, len(ids)) if scored[place] != scored[place - 1]]
    runs = [(start, end) for start, end in pairwise([*edges, len(ids)]) if scored[start]]
    return [text_of(tokenizer, ids[:end]).removeprefix(text_of(tokenizer, ids[:start])) for start, end in runs]


def generation_prompt(tokenizer, messages):
    """Return what generation is given, with the BOS that the tokenizer would add."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    adds = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id, *ids] if adds and ids[0] != tokenizer.bos_token_id else ids


def end_of(tokenizer):
    template = tokenizer.chat_template
    return next((end for end in ("<|im_end|>", "<|end|>") if end in template), tokenizer.eos_token)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("turns", [2, 4, 6])
def test_every_answer_follows_what_generation_is_given(tokenizer, turns, system):
    messages = chat(*THREE[:turns], system=system)
    row = tokenized(tokenizer, {"messages": messages})[0]
    ids, scored = parts(row)
    starts = [place for place in range(1, len(ids)) if scored[place] and not scored[place - 1]]
    asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert [ids[:start] for start in starts] == [generation_prompt(tokenizer, messages[:i]) for i in asked]
    assert row["prompt_ids"] == ids[: starts[0]]
    end = end_of(tokenizer)
    assert [run.strip().replace(" " + end, end) for run in scored_runs(tokenizer, row)] == [
        messages[i]["content"] + end for i in asked
    ]
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert [place for place in range(len(ids)) if scored[place] and ids[place] == end_id] == [
        place for place in range(len(ids)) if scored[place] and not [*scored, False][place + 1]
    ]


def test_the_ids_equal_those_of_the_whole_conversation(tokenizer):
    messages = chat(*THREE)
    ids, _ = parts(tokenized(tokenizer, {"messages": messages})[0])
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    whole = whole if whole[0] == ids[0] else [tokenizer.bos_token_id, *whole]
    assert whole[: len(ids)] == ids
    end = end_of(tokenizer)
    assert end not in text_of(tokenizer, whole[len(ids) :])


@pytest.mark.parametrize("turns", [2, 4])
def test_a_last_answer_is_tokenized_as_in_a_pair(tokenizer, turns):
    prompt, answer = chat(*THREE[: turns - 1]), chat(*THREE[:turns])[-1:]
    pair = {"prompt": prompt, "chosen": answer, "rejected": chat("", "another")[1:]}
    expected = prepare(Dataset.from_list([pair]), tokenizer, TokenizeSettings()).dataset[0]
    found = tokenized(tokenizer, {"prompt": prompt, "completion": answer})[0]
    assert found["prompt_ids"] == expected["prompt_ids"]
    assert found["response_ids"] == expected["response_ids"][:1]
    assert found["scored"] == [[True] * len(found["response_ids"][0])]


ANSWER = "{% generation %}{{ m['content'] + END }}{% endgeneration %}"
MARKED = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        + ANSWER.replace("END", "'<|im_end|>'")
        + "{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama-3": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|end|>\n\n' }}{% if m['role'] == 'assistant' %}"
        + ANSWER.replace("END", "'<|im_end|>'")
        + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|end|>\n\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
        + ANSWER.replace("END", "eos_token")
        + "{{ '\n' }}{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "mistral": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + ANSWER.replace("END", "eos_token")
        + "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_masks_match_those_marked_by_the_template(build_tokenizer, name):
    """transformers computes masks for templates that mark where answers are generated."""
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = MARKED[name]
    messages = chat("Hi?", "Good day.", "What is the capital of France?", "It is Paris", "no?", "I think")
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, scored = parts(tokenized(tokenizer, {"messages": messages})[0])
    assert ids == expected["input_ids"][: len(ids)]
    assert scored == [bool(mark) for mark in expected["assistant_masks"][: len(ids)]]
    assert not any(expected["assistant_masks"][len(ids) :])


@pytest.mark.parametrize("first", [" yes", "\nuser", "yes"])
def test_merges_across_a_boundary_are_resolved_in_every_turn(build_tokenizer, first):
    """Every answer has the ids of the answer alone, and the context is what generation is given."""
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'The answer is:' + m['content'] + eos_token }}"
        "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'The answer is:' }}{% endif %}"
    )
    messages = chat("Human", first, "Human", " no", "Human", first)
    row = tokenized(tokenizer, {"messages": messages})[0]
    ids, scored = parts(row)
    runs = [[ids[place] for place in places] for kept, places in groupby(range(len(ids)), scored.__getitem__) if kept]
    assert runs == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in (first, " no", first)]
    context = [
        [ids[place] for place in places] for kept, places in groupby(range(len(ids)), scored.__getitem__) if not kept
    ]
    assert context == [tokenizer("Human\nThe answer is:").input_ids] * 3


def test_the_boundary_above_would_merge(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    whole, alone = (tokenizer(text).input_ids for text in ("The answer is: yes", "The answer is:"))
    assert whole[: len(alone)] != alone


def test_special_token_text_in_content_stays_text(tokenizer):
    messages = chat(LITERAL, f"It is {LITERAL}", LITERAL, f"no {LITERAL}")
    plain = chat("Hi?", "It is", "Paris?", "no")
    special, reference = (tokenized(tokenizer, {"messages": one})[0] for one in (messages, plain))
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def specials(row):
        ids, scored = parts(row)
        return [(token_id, mark) for token_id, mark in zip(ids, scored, strict=True) if token_id in added]

    assert specials(special) == specials(reference)
    found = scored_runs(tokenizer, special)
    assert [LITERAL in run for run in found] == [True, True]


def test_an_end_of_turn_already_in_an_answer_is_written_once(tokenizer):
    end = end_of(tokenizer)
    carried = chat(THREE[0], THREE[1] + end + "\n", THREE[2], THREE[3] + end + end)
    found, expected = (tokenized(tokenizer, {"messages": one})[0] for one in (carried, chat(*THREE[:4])))
    assert found["response_ids"] == expected["response_ids"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "completion": "Yes."},
        {"prompt": "Hi?", "completion": chat("", "Yes.")[1]},
        {"prompt": chat("Hi?"), "completion": "Yes."},
        {"prompt": chat("Hi?"), "completion": chat("", "Yes.")[1:]},
        {"messages": chat("Hi?", "Yes."), "prompt": "Ho?", "prompt_id": "1"},
    ],
    ids=["strings", "message", "text", "lists", "ultrachat"],
)
def test_every_conversation_format_is_read(tokenizer, row):
    found, expected = tokenized(tokenizer, row)[0], tokenized(tokenizer, {"messages": chat("Hi?", "Yes.")})[0]
    for column in ("prompt_ids", "response_ids", "scored"):
        assert found[column] == expected[column]
    assert json.loads(found["extra"]) == ({"prompt": "Ho?", "prompt_id": "1"} if "messages" in row else {})


def test_only_the_completion_is_scored(tokenizer):
    """Answers within a list of prompt messages are context."""
    messages = chat(*THREE)
    found = tokenized(tokenizer, {"prompt": messages[:3], "completion": messages[3:]})[0]
    whole = tokenized(tokenizer, {"messages": messages})[0]
    assert parts(found)[0] == parts(whole)[0]
    assert scored_runs(tokenizer, found) == scored_runs(tokenizer, whole)[1:]


def test_columns_without_effect_are_counted_even_without_a_template(plain_tokenizer):
    rows = [{"prompt": "a b", "completion": "c d", "weight": 0.5}, {"prompt": "a", "completion": "d"}]
    report = prepare_sft(Dataset.from_list(rows), plain_tokenizer, TokenizeSettings()).report
    assert any("weight" in line and "1" in line for line in report.lines())


def test_raw_text_is_read_without_a_template(plain_tokenizer):
    tokenizer = plain_tokenizer
    found = tokenized(tokenizer, {"prompt": "The answer is:", "completion": " yes"})[0]
    pair = {"prompt": "The answer is:", "chosen": " yes", "rejected": "no"}
    expected = prepare(Dataset.from_list([pair]), tokenizer, TokenizeSettings()).dataset[0]
    assert found["prompt_ids"] == expected["prompt_ids"]
    assert found["response_ids"] == expected["response_ids"][:1]
    with pytest.raises(SimpoError, match="train row 0: a conversation, but the tokenizer has no chat template"):
        tokenized(tokenizer, {"messages": chat(*THREE)})


def with_good(bad, count=100):
    return Dataset.from_list([bad] + [{"messages": chat("Hi?", f"Yes {i}.")} for i in range(count - 1)])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("Hi?"), "no assistant message"),
        (chat("Hi?", ""), "empty response"),
        (chat("Hi?", " <|im_end|>\n", "no?", "yes"), "empty response"),
        (chat("", "Hi?")[1:], "the conversation starts with an assistant message"),
        ([*chat("Hi?", "a"), *chat("", "b")[1:]], "an assistant message does not follow a user or tool message"),
        ([{"role": "gpt", "content": "Hi?"}], "a message has the role 'gpt', which is neither one of system,"),
        ([], "messages has no messages"),
        (None, "messages is null, not a list of messages"),
    ],
)
def test_bad_rows_are_counted_and_reported(build_tokenizer, messages, reason):
    dataset = with_good({"messages": messages})
    report = prepare_sft(dataset, build_tokenizer("chatml"), TokenizeSettings()).report
    (found,) = report.bad
    assert found.startswith(reason)
    assert (report.bad[found], report.used, report.examples[found]) == (1, 99, ["train row 0"])
    with pytest.raises(SimpoError, match=r"^train row 0: "):
        prepare_sft(dataset, build_tokenizer("chatml"), TokenizeSettings(on_bad_row="error"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi?", "completion": None}, "completion is null, not text or messages"),
        ({"prompt": None, "completion": "Yes."}, "prompt is null, not text or messages"),
        ({"prompt": "Hi?", "completion": ""}, "empty response"),
        ({"prompt": "Hi?", "completion": chat("Hi?", "Yes.")}, "completion does not start with an assistant message"),
        ({"prompt": chat("Hi?", "Yes."), "completion": "No."}, "an assistant message does not follow"),
    ],
)
def test_bad_completions_are_reported(build_tokenizer, tmp_path, row, reason):
    rows = [row] + [{"prompt": "Hi?", "completion": f"Yes {i}."} for i in range(99)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = load_rows(str(tmp_path / "a.jsonl"), split="train")
    report = prepare_sft(dataset, build_tokenizer("chatml"), TokenizeSettings()).report
    (found,) = report.bad
    assert found.startswith(reason)


def test_messages_after_the_last_answer_are_counted(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    prepared = prepare_sft(with_good({"messages": chat(*THREE[:3])}), tokenizer, TokenizeSettings())
    assert prepared.report.cut == {UNANSWERED_CUT: 1}
    expected = tokenized(tokenizer, {"messages": chat(*THREE[:2])})[0]
    assert prepared.dataset[0]["response_ids"] == expected["response_ids"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "comparisons: use simpo train"),
        ({"prompt": "p", "completion": "c", "label": False}, "unpaired feedback"),
        ({"question": "q"}, "columns question.*accepted are {messages}"),
    ],
)
def test_other_formats_are_rejected(build_tokenizer, row, message):
    with pytest.raises(SimpoError, match=f"train: no row has a recognized shape .*{message}"):
        tokenized(build_tokenizer("chatml"), row)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"truncation": "paper"}, "^truncation: 'paper'"), ({"paper_tokenization": True}, "^paper_tokenization: ")],
)
def test_settings_for_comparisons_are_rejected(build_tokenizer, settings, message):
    with pytest.raises(SimpoError, match=message):
        tokenized(build_tokenizer("chatml"), {"messages": chat(*THREE)}, **settings)


def test_tokenized_data_is_accepted(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    first = prepare_sft(with_good({"messages": chat(*THREE)}), tokenizer, TokenizeSettings())
    assert prepare_sft(first.dataset, tokenizer, TokenizeSettings()).dataset is first.dataset
    assert first.report.lines() == ["train: 100 conversations of 100 rows"]
    pairs = first.dataset.map(lambda row: {"response_ids": row["response_ids"] * 2})
    with pytest.raises(SimpoError, match=r"train: tokenized comparisons \(up to 2 responses\), not conversations"):
        prepare_sft(pairs, tokenizer, TokenizeSettings())


def test_an_answer_without_an_end_in_the_template_gets_eos(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '\n' + m['role'] + ':' + m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("loop.last", "loop.last and m['role'] == 'assistant'")
    assert scored_runs(tokenizer, tokenized(tokenizer, {"messages": chat("Hi?", "Yes.")})[0]) == ["Yes.<|endoftext|>"]
    rows = tokenized(tokenizer, {"messages": chat(*THREE)})
    assert [scored_runs(tokenizer, row) for row in rows] == [[f"{text}<|endoftext|>"] for text in THREE[1::2]]
    assert [row["prompt_ids"] for row in rows] == [
        generation_prompt(tokenizer, chat(*THREE[:turns])) for turns in (1, 3, 5)
    ]


def test_conversations_are_split_if_the_last_answer_is_rendered_differently(build_tokenizer):
    """Qwen3's writes an empty reasoning block before the last answer only, so every answer is last in its own row."""
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '(thought)' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = tokenized(tokenizer, {"messages": chat(*THREE[:4])})
    assert [scored_runs(tokenizer, row) for row in rows] == [[f"(thought){text}<|im_end|>"] for text in THREE[1:4:2]]
    assert [row["prompt_ids"] for row in rows] == [
        generation_prompt(tokenizer, chat(*THREE[:turns])) for turns in (1, 3)
    ]


def test_a_prompt_that_is_not_a_prefix_names_the_row(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(SimpoError, match="train row 0: the rendered prompt is not a prefix of"):
        tokenized(tokenizer, {"messages": chat(*THREE)})


def test_last_turns_are_cut_until_the_rest_fits(build_tokenizer):
    tokenizer = build_tokenizer("two-bos")
    lengths = {turns: len(parts(tokenized(tokenizer, {"messages": chat(*THREE[:turns])})[0])[0]) for turns in (2, 4, 6)}
    for limit in (lengths[2], lengths[4] - 1, lengths[4], lengths[6] - 1, lengths[6]):
        kept = max(turns for turns, length in lengths.items() if length <= limit)
        prepared = prepare_sft(
            Dataset.from_list([{"messages": chat(*THREE)}]), tokenizer, TokenizeSettings(max_length=limit)
        )
        expected = tokenized(tokenizer, {"messages": chat(*THREE[:kept])})[0]
        for column in ("prompt_ids", "response_ids", "scored"):
            assert prepared.dataset[0][column] == expected[column]
        assert prepared.report.cut == ({} if kept == 6 else {TURNS_CUT: 1})


def test_a_first_turn_that_does_not_fit_is_truncated_like_a_pair(build_tokenizer):
    tokenizer = build_tokenizer("two-bos")
    messages = chat("The answer is yes " * 40, "no", "yes?", "no")
    settings = TokenizeSettings(max_length=60, max_prompt_length=30)
    prepared = prepare_sft(Dataset.from_list([{"messages": messages}]), tokenizer, settings)
    assert prepared.report.cut == {TURNS_CUT: 1, PROMPT_CUT: 1}
    row = prepared.dataset[0]
    assert len(row["prompt_ids"]) == 30 and row["prompt_ids"][0] == tokenizer.bos_token_id
    assert scored_runs(tokenizer, row) == ["no<|eot|>"]


def test_rows_that_do_not_fit_are_dropped_and_counted(build_tokenizer):
    tokenizer = build_tokenizer("two-bos")
    rows = [
        {"messages": chat("The", "The answer is yes " * 60, "yes?", "no")},
        {"messages": chat("The", "no", "yes?", "no " * 60, "?")},
        {"messages": chat("The", "no")},
    ]
    cut = prepare_sft(Dataset.from_list(rows), tokenizer, TokenizeSettings(max_length=60)).report
    assert (cut.dropped, cut.cut, cut.used) == ({STILL_OVERLONG: 1}, {TURNS_CUT: 1, UNANSWERED_CUT: 1}, 2)
    drop = prepare_sft(Dataset.from_list(rows), tokenizer, TokenizeSettings(max_length=60, truncation="drop")).report
    assert (drop.dropped, drop.cut, drop.used) == ({OVERLONG: 2}, {}, 1)
    with pytest.raises(SimpoError, match=r"^train: no row fits max_length 4: the shortest has"):
        prepare_sft(Dataset.from_list(rows), tokenizer, TokenizeSettings(max_length=4))


def test_a_prepared_conversation_becomes_a_comparison(build_tokenizer):
    from simpo.packing.layout import PackedBatch
    from simpo.training.batches import ComparisonRows, comparisons_of

    dataset = tokenized(build_tokenizer("chatml"), {"messages": chat(*THREE)})
    (comparison,) = comparisons_of(dataset, [0])
    assert comparison.scored == dataset[0]["scored"]
    assert ComparisonRows(dataset).rows.column_names == ["prompt_ids", "response_ids", "scored"]
    ids, scored = parts(dataset[0])
    assert PackedBatch.build([comparison]).targets.tolist() == [
        token_id for token_id, mark in zip(ids, scored, strict=True) if mark
    ]
    assert comparisons_of(dataset.remove_columns("scored"), [0])[0].scored is None
