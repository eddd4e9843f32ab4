"""Tokenizers of the common kinds, built offline, and a separate cache for every test."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CORPUS = [
    "Human: How do I wrap a present neatly? Assistant: I think that you can fold the paper.",
    "Human: What is the capital of France?\n\nAssistant: It is Paris, of course.",
    "The answer is: yes\nuser\nassistant\nsystem\nThe answer is: no",
] * 20
SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep tests from reading or writing the user's dataset cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def _byte_level(*specials: str | AddedToken, bos: str | None = None, adds_bos: bool = False) -> Tokenizer:
    """Build a byte-level BPE without pre-tokenization, so that merges can cross any boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*([bos] if bos else []), *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _sentencepiece(*, legacy: bool) -> Tokenizer:
    """Build a tokenizer like Llama 2's: a space precedes the text (legacy: also every text after a special token)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=specials, max_token_length=8)
    )
    state = _without_special_bytes(tokenizer)
    state.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", state.token_to_id("<s>"))]
    )
    return state


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Make byte tokens ordinary vocabulary entries rather than special tokens, as in sentencepiece."""
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def build(name: str) -> PreTrainedTokenizerFast:
    if name == "tiny-english":
        folder = SHARED / "models" / "tiny-english"
        if not folder.is_dir():
            pytest.skip("the shared models are not available")
        return AutoTokenizer.from_pretrained(folder)
    if name == "chatml":  # no BOS; the template writes a line break after the end of turn
        return PreTrainedTokenizerFast(
            tokenizer_object=_byte_level("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
            eos_token="<|endoftext|>",
            chat_template=CHATML,
        )
    if name == "two-bos":  # both the tokenizer and the template add a BOS
        return PreTrainedTokenizerFast(
            tokenizer_object=_byte_level("<|eot|>", bos="<|bos|>", adds_bos=True),
            bos_token="<|bos|>",
            eos_token="<|eot|>",
            chat_template=BOS_CHAT,
        )
    if name == "own-bos":  # only the tokenizer adds a BOS
        tokenizer = build("two-bos")
        tokenizer.chat_template = BOS_CHAT.replace("{{ bos_token }}", "")
        return tokenizer
    if name == "phi":  # special tokens swallow the whitespace after them; text follows the end of turn
        strips = [AddedToken(f"<|{role}|>", rstrip=True, special=True) for role in ("user", "assistant", "end")]
        return PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(*strips, "<|endoftext|>"),
            eos_token="<|endoftext|>",
            chat_template=PHI_CHAT,
        )
    legacy = {"sentencepiece": False, "sentencepiece-legacy": True}[name]
    return PreTrainedTokenizerFast(
        tokenizer_object=_sentencepiece(legacy=legacy),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=LLAMA2_CHAT,
    )


KINDS = ("chatml", "two-bos", "own-bos", "phi", "sentencepiece", "sentencepiece-legacy", "tiny-english")


@pytest.fixture(params=KINDS)
def tokenizer(request):
    """One chat tokenizer of each kind."""
    return build(request.param)


@pytest.fixture(params=[kind for kind in KINDS if kind != "phi"])
def plain_tokenizer(request):
    """One tokenizer without a chat template of each kind."""
    tokenizer = build(request.param)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def build_tokenizer():
    """``build_tokenizer(kind)``: a tokenizer of that kind."""
    return build
