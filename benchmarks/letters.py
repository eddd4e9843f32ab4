"""A tokenizer with single-letter tokens, and a small Llama to go with it."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_END = "<end>"


def letter(token: int) -> str:
    """Return the text of a token; token 1 is ``a``."""
    return chr(ord("a") + token - 1)


def letter_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer for ``tokens - 1`` letters separated by whitespace; token 0 ends an answer."""
    letters = {letter(token): token for token in range(1, tokens)}
    tokenizer = Tokenizer(models.WordLevel({_END: 0} | letters, _END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def letter_model(tokens: int, *, layers: int, spread: float, seed: int) -> LlamaForCausalLM:
    """Return a Llama with random weights of standard deviation ``spread``."""
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)
