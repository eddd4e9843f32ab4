"""A tiny chat model with varied answers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from simpo.world.pairs import make_model, make_tokenizer


@pytest.fixture(scope="session")
def write_chat_model():
    """``write_chat_model(folder, texts, positions, seed=0)``: a random model with a different token at each step.

    Its weights are large and its embeddings untied; otherwise a random model repeats its last token.
    """

    def write(folder, texts, positions: int, seed: int = 0) -> None:
        tokenizer = make_tokenizer(texts, vocab_size=300)
        tokenizer.save_pretrained(folder)
        config = make_model(tokenizer, seed=0).config
        config.tie_word_embeddings, config.max_position_embeddings = False, positions
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)

    return write
