"""The world's tokenizer, chat template and initial model."""

import hashlib

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.world.pairs import make_sft, world_tokenizer, write_model

STRANGE = ["", " ", "Où?", "日本語", "😀\n\t", "\x00\x1b[0m", "The  count is 7 . ", "don't", "ﬀ é"]


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


def test_every_text_survives_a_round_trip(tokenizer):
    texts = [text for row in make_sft(500, seed=9) for text in row.values()] + STRANGE
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_every_word_in_the_world_is_one_token(tokenizer):
    texts = [text for row in make_sft(3000, seed=9) for text in row.values()]
    words = {word.strip(".?,").removesuffix("'s") for text in texts for word in text.split()[1:]}
    split = {word for word in words if len(tokenizer(f" {word}", add_special_tokens=False).input_ids) > 1}
    assert len(words) > 100
    assert split <= {str(number) for number in range(100)}  # rare numbers are split into digits
    assert len(tokenizer) < 640


def test_the_template_begins_once_and_ends_every_answer(tokenizer):
    question = [{"role": "user", "content": "Sort 3, 2, 1."}]
    answered = [*question, {"role": "assistant", "content": "The order is 1, 2, 3."}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(answered, return_dict=False)
    assert whole[: len(asked)] == asked
    assert whole.count(tokenizer.bos_token_id) == 1
    assert whole[0] == tokenizer.bos_token_id
    assert whole[-1] == tokenizer.eos_token_id
    assert whole.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(whole[len(asked) : -1]) == "The order is 1, 2, 3."


def test_the_seed_determines_the_model_but_not_the_tokenizer(tmp_path):
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_model(tmp_path / name, seed)
        digests.append({path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / name).iterdir()})
    assert digests[0] == digests[1]
    assert {name for name in digests[0] if digests[0][name] != digests[2][name]} == {"model.safetensors"}


def test_plain_transformers_loads_it(tmp_path, tokenizer):
    write_model(tmp_path / "start", 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    assert 300_000 < model.num_parameters() < 500_000
    assert AutoTokenizer.from_pretrained(tmp_path / "start").get_vocab() == tokenizer.get_vocab()
    assert model.config.vocab_size == len(tokenizer)
