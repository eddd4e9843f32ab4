"""Texts of responses compared with the words that were encoded."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from simpo.generation.responses import ResponseText
from simpo.world.pairs import make_tokenizer

SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def byte_level():
    return make_tokenizer(["a few words"])


@pytest.fixture
def metaspace():
    """A tokenizer like sentencepiece: words begin with their space, and decoding strips the first one."""
    words = ["<s>", "</s>", "<unk>", "▁Hi", "▁Paris", "▁is", "▁[INST]", "▁[/INST]", "▁"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=SPACED
    )


@pytest.mark.parametrize("text", ["Two words.", " a space first", "trailing \n", "", "Grüße 🎉", "\n\ntwo lines"])
def test_the_text_is_what_was_encoded(byte_level, text):
    prompt = byte_level("<|user|>Hi<|assistant|>").input_ids
    ids = byte_level(text).input_ids
    end = byte_level.eos_token_id
    assert ResponseText(byte_level).decode(prompt, [*ids, end]) == text
    assert ResponseText(byte_level).decode(prompt, ids) == text


@pytest.mark.parametrize("template", [None, SPACED])
def test_sampled_tokens_decode_to_the_rendered_text(byte_level, template):
    byte_level.chat_template = template or byte_level.chat_template
    user = {"role": "user", "content": "Hi"}
    whole = byte_level.apply_chat_template([user, {"role": "assistant", "content": "a few words"}], tokenize=False)
    prompt = byte_level.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    before = byte_level(prompt, add_special_tokens=False).input_ids
    ids = byte_level(whole, add_special_tokens=False).input_ids[len(before) :]
    assert ids[-1] == byte_level.eos_token_id
    assert ResponseText(byte_level).decode(before, ids) == "a few words"


def test_special_tokens_are_not_part_of_the_text(byte_level):
    user = byte_level.convert_tokens_to_ids("<|user|>")
    ids = [*byte_level("one").input_ids, user, *byte_level(" two").input_ids, byte_level.eos_token_id]
    assert ResponseText(byte_level).decode([user], ids) == "one two"


def test_an_end_of_turn_token_not_marked_as_special(byte_level):
    byte_level.add_tokens(["<turn_end>"])
    byte_level.chat_template = "{% for m in messages %}{{ m['content'] + '<turn_end>' }}{% endfor %}"
    end = byte_level.convert_tokens_to_ids("<turn_end>")
    assert ResponseText(byte_level).decode([5], [*byte_level("yes").input_ids, end]) == "yes"


def test_spaces_added_by_the_template_are_not_part_of_the_text(metaspace):
    """The template adds them again when the text is rendered; without a template they belong to the text."""
    prompt = metaspace("<s>▁[INST] Hi [/INST]", add_special_tokens=False).input_ids
    paris, there, space, end = (metaspace.convert_tokens_to_ids(w) for w in ("▁Paris", "▁is", "▁", "</s>"))
    assert ResponseText(metaspace).decode(prompt, [paris, there, space, end]) == "Paris is"
    metaspace.chat_template = None
    assert ResponseText(metaspace).decode(prompt, [paris, there, end]) == " Paris is"
