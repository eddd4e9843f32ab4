"""Small random models with different kinds of attention, and comparisons for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel

from simpo.packing.layout import TokenizedComparison

VOCABULARY = 1003
WINDOW = 48
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.08,  # large enough that attention is far from uniform
    "attn_implementation": "eager",  # the reference; sdpa would ignore Gemma 2's softcap
}
KINDS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**_SIZES, sliding_window=WINDOW, query_pre_attn_scalar=64, attn_logit_softcapping=5.0),
}


def build(kind: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build a model with the same weights every time, up to rounding to ``dtype``."""
    torch.manual_seed(0)
    # via bf16, so that every dtype represents the same weights exactly
    return AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.float32).bfloat16().to(device, dtype)


def comparisons(device: str, vocabulary: int = VOCABULARY) -> list[TokenizedComparison]:
    """Return comparisons with prompts longer and shorter than the window (shorter overall on a CPU)."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(200, 70, 33), (9, 61, 120), (300, 5, 80)] if device == "cuda" else [(60, 21, 9), (5, 12, 30)]

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return [TokenizedComparison(ids(prompt), [ids(size) for size in responses]) for prompt, *responses in sizes]
