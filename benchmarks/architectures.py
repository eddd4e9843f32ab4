"""Which path each causal architecture takes: ``python -m benchmarks.architectures [--write] [TYPE ...]``

Each architecture of transformers is built at toy size with random weights and checked as a user's model would be. Its
log-probabilities and the gradients of all parameters are then compared with the model's own forward, one sequence at a
time, in float32. ``--write`` rewrites the table in ``docs/models.md``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from simpo.packing.layout import TokenizedComparison

VOCABULARY = 101
LAYERS = 4
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
_LARGEST = 5_000_000  # parameters; what is larger has a size that no known key reduces

# Small values of the keys that configurations have; a key that a configuration does not have is left out.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "n_embed", "embed_dim", "embedding_size", "lru_width"], 64),
    **dict.fromkeys(["mamba_d_ssm", "attention_hidden_size", "word_embed_proj_dim", "linear_conv_hidden_size"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "dim_ff", "decoder_ffn_dim"], 96),
    **dict.fromkeys(["shared_intermediate_size", "intermediate_size_mlp"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "num_key_value_heads", "num_kv_heads", "o_groups"], 2),
    **dict.fromkeys(["head_dim", "kv_channels", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "dim_head"], 16),
    **dict.fromkeys(["kv_lora_rank", "o_lora_rank", "index_head_dim", "hidden_size_per_layer_input"], 16),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "sliding_window", "attention_chunk_size"], 16),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "mamba_d_head", "mamba_head_dim", "mamba_headdim"], 16),
    **dict.fromkeys(["attention_window", "attention_window_size"], 16),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "qk_head_dim", "q_lora_rank"], 32),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 256),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["n_mamba_heads", "rotary_dim", "index_topk"], 8),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"], 1),
    **dict.fromkeys(["n_groups", "mamba_ngroups", "bos_token_id"], 1),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["linear_num_key_heads", "index_n_heads", "encoder_layers", "eos_token_id"], 2),
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "is_decoder": True,
}
# Where those do not suffice: keys that hang together, or that have other names.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
    },
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "n_mamba_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "olmo_hybrid": {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "xlstm": {
        "embedding_dim": 64,
        "num_blocks": LAYERS,
        "mode": "train",
        "chunkwise_kernel": "chunkwise--native_autograd",
    },
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}


def toy_config(model_type: str, **more: Any) -> PreTrainedConfig:
    """A configuration of this type with four small layers, of each kind that the type has."""
    kind = CONFIG_MAPPING[model_type]
    default, accepted = kind(), inspect.signature(kind.__init__).parameters
    values = {key: value for key, value in _SMALL.items() if _settable(kind, default, key) or key in accepted}
    for key in ("layer_types", "mlp_layer_types"):
        if (kinds := getattr(default, key, None)) and _settable(kind, default, key):
            values[key] = (list(dict.fromkeys(kinds)) * LAYERS)[:LAYERS]
    return kind(**values | _SPECIAL.get(model_type, {}) | more)


def _settable(kind: type, default: PreTrainedConfig, key: str) -> bool:
    attribute = inspect.getattr_static(kind, key, None)
    return key in default.to_dict() and not (isinstance(attribute, property) and attribute.fset is None)


def build(model_type: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """The model with random weights, large enough for attention to be far from uniform, and without dropout.

    Raises:
        ValueError: it is large even so.
    """
    config = toy_config(model_type, **more)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}  # has float64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options).to(dtype).train()
    with torch.no_grad():  # biases and norms too, so that one that is left out shows
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.1 * noise)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("attention_dropout", "router_jitter_noise", "input_jitter_noise"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return model


def comparisons(seed: int = 0) -> list[TokenizedComparison]:
    """K = 2, 5 and 1 responses; a prompt and responses shorter than a convolution's window."""
    generator = torch.Generator().manual_seed(seed)

    def ids(size: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()

    sizes = [(20, (7, 12)), (2, (1, 5, 3, 1, 2)), (37, (9,))]
    return [TokenizedComparison(ids(prompt), [ids(size) for size in responses]) for prompt, responses in sizes]


def naive_logprobs(model: PreTrainedModel, rows: list[TokenizedComparison]) -> Tensor:
    """``[S]`` log-probabilities by the model's own forward, one sequence at a time."""
    found = []
    for row in rows:
        for response in row.response_ids:
            logits = model(input_ids=torch.tensor([row.prompt_ids + response]), use_cache=False).logits[0]
            logps = logits[len(row.prompt_ids) - 1 : -1].log_softmax(
                -1, dtype=torch.promote_types(logits.dtype, torch.float)
            )
            found.append(logps.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)
