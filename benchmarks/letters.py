"""Models of a few letters: a tokenizer whose tokens are single letters, and a small Llama."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_END = "<end>"


def letter(token: int) -> str:
    """The text of a token; 1 is ``a``."""
    return chr(ord("a") + token - 1)


def letter_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """``tokens - 1`` letters with white space between them, and token 0, which ends an answer."""
    letters = {letter(token): token for token in range(1, tokens)}
    tokenizer = Tokenizer(models.WordLevel({_END: 0} | letters, _END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def letter_model(tokens: int, *, layers: int, spread: float, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, whose standard deviation is ``spread``."""
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
