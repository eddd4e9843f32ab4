"""Token-level invariants for every kind of tokenizer, against transformers' own rendering and decoding."""

from __future__ import annotations

import pytest
from datasets import Dataset

from simpo.data.settings import TokenizeSettings
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError

USER = "How do I wrap a present neatly?"
CHOSEN = "I think that you can fold the paper."
REJECTED = "The answer is: no"
LITERAL = "what do <|im_end|>, </s>, <|end|>, <|bos|>, <|eot|> and <s> mean?"
END = {"chatml": "<|im_end|>", "phi": "<|end|>"}


def tokenized(tokenizer, *rows, **settings):
    dataset = Dataset.from_list(list(rows))
    return prepare(dataset, tokenizer, TokenizeSettings(**settings)).dataset


def chat(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


def end_of(tokenizer):
    template = tokenizer.chat_template or ""
    return next((text for text in END.values() if text in template), tokenizer.eos_token)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def without_bos(tokenizer, text):
    bos = tokenizer.bos_token
    while bos and text.startswith(bos):
        text = text.removeprefix(bos)
    # Sentencepiece decoders may write or strip one leading space.
    return text.lstrip(" ")


PAIR = {"prompt": chat(USER), "chosen": chat("", CHOSEN)[1:], "rejected": chat("", REJECTED)[1:]}
LONG = {
    "prompt": chat(USER, "It is Paris, of course.", "What is the capital of France?"),
    "chosen": chat("", CHOSEN)[1:],
    "rejected": chat("", " no\n")[1:],
}


@pytest.mark.parametrize("row", [PAIR, LONG], ids=["one turn", "three turns"])
def test_a_prompt_equals_what_generation_is_given(tokenizer, row):
    expected = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    if expected[0] != tokenizer.bos_token_id and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        expected = [tokenizer.bos_token_id, *expected]
    assert tokenized(tokenizer, row)[0]["prompt_ids"] == expected


@pytest.mark.parametrize("row", [PAIR, LONG], ids=["one turn", "three turns"])
def test_response_ids_decode_to_the_rendered_response(tokenizer, row):
    found = tokenized(tokenizer, row)[0]
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    fed = text_of(tokenizer, found["prompt_ids"])
    for ids, side in zip(found["response_ids"], ("chosen", "rejected"), strict=True):
        rendered = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        end = rendered.rindex(end_of(tokenizer)) + len(end_of(tokenizer))
        assert text_of(tokenizer, found["prompt_ids"] + ids) == fed + rendered[len(prompt) : end]


@pytest.mark.parametrize("prompt", ["The answer is:", "The answer is: ", "The answer is:\n", "", "a"])
@pytest.mark.parametrize("response", ["I think", " I think", "yes", "\n\nHuman: no", "é 漢字"])
def test_raw_text_is_split_where_the_response_begins(plain_tokenizer, prompt, response):
    """Merges across the boundary are resolved: the prompt's ids never depend on the response."""
    tokenizer = plain_tokenizer
    row = {"prompt": prompt, "chosen": response, "rejected": response + "!"}
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    if not prompt and not adds_bos:
        with pytest.raises(SimpoError, match="empty prompt"):
            tokenized(tokenizer, row)
        return
    found = tokenized(tokenizer, row)[0]
    assert found["prompt_ids"] == tokenizer(prompt).input_ids
    chosen = found["response_ids"][0]
    assert chosen[-1] == tokenizer.eos_token_id and chosen.count(tokenizer.eos_token_id) == 1
    decoded = text_of(tokenizer, found["prompt_ids"] + chosen)
    assert without_bos(tokenizer, decoded) == (prompt + response).lstrip(" ") + tokenizer.eos_token


def test_a_byte_level_merge_is_not_cut_apart(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = None
    prompt, response = "The answer is:", " yes"
    whole, alone = (tokenizer(text).input_ids for text in (prompt + response, prompt))
    assert whole[: len(alone)] != alone, "the tokenizer must merge across this boundary for the test to test"
    found = tokenized(tokenizer, {"prompt": prompt, "chosen": response, "rejected": "no"})[0]
    assert found["prompt_ids"] == alone
    assert found["response_ids"][0] == [*tokenizer(response).input_ids, tokenizer.eos_token_id]


def test_there_is_exactly_one_bos(tokenizer):
    bos = tokenizer.bos_token_id
    ids = tokenized(tokenizer, PAIR)[0]["prompt_ids"]
    assert ids.count(bos) == (0 if bos is None else 1)
    assert bos is None or ids[0] == bos


def test_transformers_would_have_produced_two_bos(build_tokenizer):
    tokenizer = build_tokenizer("two-bos")
    rendered = tokenizer.apply_chat_template(PAIR["prompt"], tokenize=False)
    assert tokenizer(rendered).input_ids.count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize("repeat", [0, 1, 2])
def test_there_is_exactly_one_end_of_turn(tokenizer, repeat):
    end = end_of(tokenizer)
    row = {**PAIR, "chosen": chat("", CHOSEN + repeat * end + repeat * "\n")[1:]}
    end_id = tokenizer.convert_tokens_to_ids(end)
    for ids in tokenized(tokenizer, row)[0]["response_ids"]:
        assert ids[-1] == end_id and ids.count(end_id) == 1


def test_special_token_text_in_content_stays_text(tokenizer):
    """It decodes to itself, and the only special ids are those written by the template."""
    row = {
        "prompt": chat(LITERAL),
        "chosen": chat("", f"{CHOSEN} {LITERAL}")[1:],
        "rejected": PAIR["rejected"],
    }
    special, plain = tokenized(tokenizer, row)[0], tokenized(tokenizer, PAIR)[0]
    added = set(tokenizer.all_special_ids) | {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for ids, reference in zip(
        [special["prompt_ids"], *special["response_ids"]],
        [plain["prompt_ids"], *plain["response_ids"]],
        strict=True,
    ):
        assert [i for i in ids if i in added] == [i for i in reference if i in added]
    assert LITERAL in text_of(tokenizer, special["prompt_ids"])
    assert f"{CHOSEN} {LITERAL}" in text_of(tokenizer, special["prompt_ids"] + special["response_ids"][0])


def test_special_text_in_one_response_does_not_affect_the_rest(tokenizer):
    """The ids of everything else in the row stay the same."""
    row = {**PAIR, "rejected": chat("", LITERAL)[1:]}
    careful, plain = tokenized(tokenizer, row)[0], tokenized(tokenizer, PAIR)[0]
    assert careful["prompt_ids"] == plain["prompt_ids"]
    assert careful["response_ids"][0] == plain["response_ids"][0]


def test_special_token_text_without_a_template_is_parsed(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = None
    prompt = "<|im_start|>user\nhello<|im_end|>\n"
    found = tokenized(tokenizer, {"prompt": prompt, "chosen": "a", "rejected": "b"})[0]
    assert found["prompt_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_text_after_the_end_of_turn_is_not_part_of_the_response(build_tokenizer):
    for kind in ("chatml", "phi"):
        tokenizer = build_tokenizer(kind)
        rendered = tokenizer.apply_chat_template(PAIR["prompt"] + PAIR["chosen"], tokenize=False)
        assert not rendered.endswith(END[kind])
        ids = tokenized(tokenizer, PAIR)[0]["response_ids"][0]
        assert text_of(tokenizer, ids) == CHOSEN + END[kind]


def test_a_prompt_that_is_not_a_prefix_names_the_row(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = CHATML_THAT_COUNTS
    with pytest.raises(SimpoError, match="train row 0: the rendered prompt is not a prefix of"):
        tokenized(tokenizer, PAIR)


CHATML_THAT_COUNTS = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_a_template_without_an_end_of_turn_gets_eos(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    found = tokenized(tokenizer, PAIR)[0]["response_ids"][0]
    assert text_of(tokenizer, found) == "assistant: " + CHOSEN + "<|endoftext|>"


@pytest.mark.parametrize("kind", ["chatml", "two-bos", "sentencepiece", "tiny-english"])
def test_paper_tokenization_scores_the_header_and_the_rest(build_tokenizer, kind):
    tokenizer = build_tokenizer(kind)
    found = tokenized(tokenizer, PAIR, paper_tokenization=True)[0]
    expected = tokenizer.apply_chat_template(PAIR["prompt"], add_generation_prompt=False, return_dict=False)
    assert found["prompt_ids"] == expected
    whole = tokenizer.apply_chat_template(PAIR["prompt"] + PAIR["chosen"], return_dict=False)
    eos = [] if whole[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
    assert found["prompt_ids"] + found["response_ids"][0] == whole + eos


def test_system_message_is_inserted_if_the_template_supports_one(build_tokenizer):
    tokenizer = build_tokenizer("sentencepiece")
    found = tokenized(tokenizer, PAIR, auto_insert_empty_system_msg=True)[0]["prompt_ids"]
    messages = [{"role": "system", "content": ""}, *PAIR["prompt"]]
    assert found == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokenizer = build_tokenizer("two-bos")
    assert "system" not in tokenizer.chat_template
    inserted, without = (tokenized(tokenizer, PAIR, auto_insert_empty_system_msg=v)[0] for v in (True, False))
    assert inserted == without


def test_strings_become_turns_if_there_is_a_template(tokenizer):
    strings = {"prompt": USER, "chosen": CHOSEN, "rejected": REJECTED}
    found, expected = tokenized(tokenizer, strings)[0], tokenized(tokenizer, PAIR)[0]
    assert (found["prompt_ids"], found["response_ids"]) == (expected["prompt_ids"], expected["response_ids"])


def test_transcripts_become_turns_if_there_is_a_template(tokenizer):
    shared = f"\n\nHuman: {USER}\n\nAssistant: Paris\n\nHuman: yes?\n\nAssistant:"
    transcripts = {"chosen": f"{shared} {CHOSEN}", "rejected": f"{shared} {REJECTED}"}
    turns = {**PAIR, "prompt": chat(USER, "Paris", "yes?")}
    found, expected = tokenized(tokenizer, transcripts)[0], tokenized(tokenizer, turns)[0]
    assert (found["prompt_ids"], found["response_ids"]) == (expected["prompt_ids"], expected["response_ids"])


def test_transcripts_are_raw_text_without_a_template(plain_tokenizer):
    prompt = f"\n\nHuman: {USER}\n\nAssistant:"
    found = tokenized(plain_tokenizer, {"chosen": f"{prompt} {CHOSEN}", "rejected": f"{prompt} {REJECTED}"})[0]
    assert found["prompt_ids"] == plain_tokenizer(prompt).input_ids
    decoded = text_of(plain_tokenizer, found["prompt_ids"] + found["response_ids"][1])
    assert without_bos(plain_tokenizer, decoded) == f"{prompt} {REJECTED}{plain_tokenizer.eos_token}"


def test_messages_without_a_template_are_rejected(plain_tokenizer):
    with pytest.raises(SimpoError, match="train row 0: a conversation, but the tokenizer has no chat template"):
        tokenized(plain_tokenizer, PAIR)


def test_more_than_two_responses_are_ordered_best_first(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    row = {"prompt": USER, "responses": ["b", "a", "c", "d"], "scores": [1.0, 3, 1.0, -2]}
    ids = tokenized(tokenizer, row)[0]["response_ids"]
    assert [text_of(tokenizer, one) for one in ids] == [f"{letter}<|im_end|>" for letter in "abcd"]
