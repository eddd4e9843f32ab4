"""Which path each causal architecture takes: ``python -m benchmarks.architectures [--write] [TYPE ...]``

Every causal architecture in transformers is built at toy size with random weights and goes through the same self-check
as a user's model. Its log-probabilities and all parameter gradients are then compared with the model's own forward, one
sequence at a time, in float32. ``--write`` rewrites the table in ``docs/models.md``.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from simpo.errors import SimpoError
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import policy_logprobs, prepare_policy, state_of

VOCABULARY = 101
LAYERS = 4
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
_MAX_PARAMETERS = 5_000_000  # a larger model has a dimension that none of the keys below reduces

# Toy values for size keys. Keys that a configuration does not have are skipped.
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
    **dict.fromkeys(["linear_num_key_heads", "encoder_layers", "eos_token_id"], 2),
    "index_n_heads": 64,  # as in real models: with a few, all of them often score 0, and the choice of tokens is random
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "is_decoder": True,
}
# Architectures that need more: keys that depend on each other or have unusual names.
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
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "longcat_flash": {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2},
    "roc_bert": {"pronunciation_embed_dim": 64, "shape_embed_dim": 64, "shape_vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
}


def toy_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return a configuration of this type with four small layers that cover every layer type it has."""
    config_type = CONFIG_MAPPING[model_type]
    default, accepted = config_type(), inspect.signature(config_type.__init__).parameters
    defaults = default.to_dict()
    values = {key: value for key, value in _SMALL.items() if _settable(config_type, defaults, key) or key in accepted}
    values |= {key: 0.0 for key, value in defaults.items() if isinstance(value, float) and _is_random(key)}
    for key in ("layer_types", "mlp_layer_types"):
        if (types := getattr(default, key, None)) and _settable(config_type, defaults, key):
            values[key] = (list(dict.fromkeys(types)) * LAYERS)[:LAYERS]
    if "kv_lora_rank" in values:  # latent attention has no grouped heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    return config_type(**values | _SPECIAL.get(model_type, {}) | overrides)


def _is_random(key: str) -> bool:
    return "drop" in key or key.endswith("jitter_noise")


def _settable(config_type: type, defaults: dict[str, Any], key: str) -> bool:
    attribute = inspect.getattr_static(config_type, key, None)
    return key in defaults and not (isinstance(attribute, property) and attribute.fset is None)


def build(
    model_type: str, dtype: torch.dtype = torch.float32, *, device: str = "cpu", **overrides: Any
) -> PreTrainedModel:
    """Build a toy model without dropout, with random weights large enough that attention is far from uniform.

    Raises:
        ValueError: if the model is large despite the toy sizes.
    """
    config = toy_config(model_type, **overrides)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}  # has float64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options).to(dtype).train()
    with torch.no_grad():  # biases and norms too, so that leaving one out is noticed
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.1 * noise)
    return model.to(device)


def comparisons(seed: int = 0) -> list[TokenizedComparison]:
    """Return comparisons with 2, 5 and 1 responses, some shorter than a convolution's window."""
    generator = torch.Generator().manual_seed(seed)

    def ids(size: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()

    sizes = [(20, (7, 12)), (2, (1, 5, 3, 1, 2)), (37, (9,))]
    return [TokenizedComparison(ids(prompt), [ids(size) for size in responses]) for prompt, responses in sizes]


def naive_logprobs(model: PreTrainedModel, rows: list[TokenizedComparison]) -> Tensor:
    """Compute log-probabilities ``[S]`` with the model's own forward, one sequence at a time."""
    found = []
    for row in rows:
        for response in row.response_ids:
            ids = torch.tensor([row.prompt_ids + response], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logps = logits[len(row.prompt_ids) - 1 : -1].log_softmax(
                -1, dtype=torch.promote_types(logits.dtype, torch.float)
            )
            found.append(logps.gather(-1, ids[0, len(row.prompt_ids) :, None])[:, 0])
    return torch.cat(found)


# ---- The table


class Finding(NamedTuple):
    """The path an architecture takes, and how accurate it is.

    Attributes:
        path: "packed", "cached" or "padded"; "rejected"; or "not built" if no toy model could be built.
        logprobs: largest error of a log-probability, in nats.
        gradients: largest error of a gradient, relative to the largest gradient.
        note: the self-check's log, such as why the packed path was not taken, or why there is no toy model.
    """

    path: str
    logprobs: float | None
    gradients: float | None
    note: str


def examine(model_type: str, device: str = "cpu") -> Finding:
    """Build an architecture, let the self-check choose a path, and compare that path with the model's own forward."""
    try:
        model = build(model_type, device=device)
        naive_logprobs(model, comparisons()[:1])
    except Exception as error:  # whatever goes wrong, only the reason matters here
        return Finding("not built", None, None, _first_line(error))
    rows = comparisons()
    try:
        found = policy_logprobs(model, PackedBatch.build(rows).to(device))
    except SimpoError as error:
        return Finding("rejected", None, None, _first_line(error))
    expected = naive_logprobs(model, rows)
    state = state_of(prepare_policy(model))
    return Finding(
        str(state.path),
        (found - expected).detach().abs().max().item(),
        _gradient_difference(model, found, expected),
        "; ".join(state.reasons),
    )


def _gradient_difference(model: nn.Module, found: Tensor, expected: Tensor) -> float:
    weights = torch.linspace(0.5, 1.5, len(found), device=found.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(logps: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True, materialize_grads=True)

    pairs = list(zip(gradients(found), gradients(expected), strict=True))
    return float(max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def table_row(model_type: str, finding: Finding) -> str:
    """Format one line of the table."""
    numbers = ["" if value is None else f"{value:.0e}" for value in (finding.logprobs, finding.gradients)]
    note = re.sub(r"\s+", " ", finding.note).replace("|", "\\|")
    return f"| `{model_type}` | {finding.path} | {' | '.join(numbers)} | {note} |"


def published_rows() -> dict[str, str]:
    """Return the lines of the table in ``docs/models.md``, by architecture."""
    text = PAGE.read_text() if PAGE.exists() else ""
    return {match[1]: match[0] for match in re.finditer(r"^\| `(\w[\w-]*)` \|.*$", text, re.MULTILINE)}


def render_page(rows: dict[str, str]) -> str:
    """Return the text of ``docs/models.md`` with these lines in its table."""
    paths = [row.split(" | ")[1] for row in rows.values()]
    counts = ", ".join(
        f"{paths.count(path)} {path}" for path in ("packed", "cached", "padded", "rejected", "not built")
    )
    versions = f"transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}"
    return _PAGE.format(versions=versions, counts=counts, rows="\n".join(rows[name] for name in sorted(rows)))


_PAGE = """\
# Which path each architecture takes

Look up your model's architecture here to see whether it shares prompts, and how exact the result is. Generated by
`python -m benchmarks.architectures --write`. Tested: {versions}, on a CPU, in float32.

We built each causal architecture of transformers at toy size (four layers, random weights) and computed comparisons
with 1, 2 and 5 responses. The self-check chose the path, as it does for your model. Then we compared the
log-probabilities and the gradients of all parameters with those of the model's own forward pass, one sequence at a
time.

- **packed**: a prompt is computed once for all of its responses, inside attention, and nothing is padded.
- **cached**: a prompt is computed once and passed to all of its responses through the model's own cache: keys and
  values, recurrent states, convolution windows. Prompts are padded to one length, and so are responses.
  If padding in front of a prompt changes the results, each comparison is computed on its own.
- **padded**: the prompt is computed again for every response.
- **rejected**: an error before training.
- **not built**: we could not build a toy model from the default configuration with small sizes. This says nothing about
  real checkpoints; as always, the self-check decides. Many of these are multimodal models whose language model has its
  own row (`llama4_text`, `qwen3_5_text`, ...).

The difference columns show the largest difference: of a log-probability in nats, and of a gradient relative to the
largest gradient. [Which path a model takes](training.md#which-path-a-model-takes) explains the rules.

## Not yet

- **MiniMax** (`minimax`, lightning attention) is padded, because it keeps its states in its own cache class. Passing
  them on would bring little: starting from a state, its layer in transformers computes one token after the other, and
  keeps a state for each of them until the backward pass. With the 64 heads of size 128 of MiniMax-Text-01, this is a
  million numbers per token and layer, compared with 6,144 for the hidden state. MiniMax-M2 and M3 have only attention,
  and are packed.
- **Kernels with `cu_seqlens`** (flash-linear-attention, causal-conv1d, mamba-ssm), which take sequences of different
  lengths without padding, are not used: they require CUDA, and we could not verify their results. Hybrid and
  state-space models take the cached path on every device. If such a package is installed, transformers itself may use
  its kernels in that path; the self-check then compares them like everything else.

## The table

{counts}.

| architecture | path | log-probabilities | gradients | self-check log |
|---|---|---:|---:|---|
{rows}
"""


def main(arguments: list[str] | None = None) -> None:
    """Print the rows of the named architectures, by default all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="a configuration's model_type (default: all)")
    parser.add_argument("--write", action="store_true", help="write the rows into docs/models.md")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if options.write and options.device != "cpu":
        parser.error("--write: docs/models.md is for the CPU; leave out --device")
    if unknown := set(options.types) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        parser.error(f"not a causal architecture in transformers: {', '.join(sorted(unknown))}")
    rows = published_rows() if options.types else {}
    for name in options.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rows[name] = table_row(name, examine(name, options.device))
        print(rows[name], flush=True)
        if options.write:
            PAGE.write_text(render_page(rows))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    main()
