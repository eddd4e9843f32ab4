"""Tiny random models, random comparisons, and the naive log-probabilities used as a reference."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers as hf
from torch import Tensor

import simpo.packing.selfcheck  # noqa: F401 - see float64_everywhere
from simpo.packing.layout import TokenizedComparison
from simpo.world.pairs import make_tokenizer

# If started in the background, as in some CI systems, the tests and their child processes would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the models are tiny, and the tests run in several processes


def pytest_collection_finish():
    """Freeze the garbage collector: accelerate's collection after every run would otherwise dominate training time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Run files with slow tests first, so that no core waits for one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run each file in one process, so that its fixtures are built once, and start files in the order above."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False
    return LoadScopeScheduling(config, log)


VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def _without(*names: str) -> dict:
    return {key: value for key, value in _SIZES.items() if key not in names}


_CONFIGS = {
    "llama": (hf.LlamaConfig, _SIZES | {"tie_word_embeddings": True}),
    "mistral": (hf.MistralConfig, _SIZES | {"sliding_window": 6}),
    "qwen2": (hf.Qwen2Config, _SIZES),
    "qwen3": (hf.Qwen3Config, _SIZES | {"head_dim": 8}),
    "gemma2": (
        hf.Gemma2Config,
        _SIZES
        | {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,  # low enough to matter with random weights
            "final_logit_softcapping": 5.0,
            "attn_implementation": "eager",  # sdpa ignores the softcap
        },
    ),
    "gemma3": (
        hf.Gemma3TextConfig,
        _SIZES | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": _MIXED},
    ),
    "phi3": (hf.Phi3Config, _SIZES),
    "opt": (  # like facebook/opt-350m: projections around the layers, and norms after them
        hf.OPTConfig,
        _without("intermediate_size", "num_key_value_heads")
        | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt2": (
        hf.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "gpt_neox": (hf.GPTNeoXConfig, _without("num_key_value_heads")),
    "mixtral": (hf.MixtralConfig, _SIZES | {"num_local_experts": 4, "experts_implementation": "eager"}),
    "gpt_oss": (
        hf.GptOssConfig,
        _SIZES
        | {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "experts_implementation": "eager"}
        | {"layer_types": _MIXED, "attn_implementation": "eager"},
    ),
    "cohere": (hf.CohereConfig, _SIZES | {"logit_scale": 0.3}),
    "granite": (hf.GraniteConfig, _SIZES | {"logits_scaling": 3.0, "attention_multiplier": 0.4}),
    "stablelm": (hf.StableLmConfig, _SIZES),
    "falcon": (hf.FalconConfig, _without("intermediate_size", "num_key_value_heads")),
    "bloom": (hf.BloomConfig, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mamba": (hf.MambaConfig, {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}),
    "lfm2": (hf.Lfm2Config, _SIZES | {"layer_types": ["conv", "full_attention", "conv"]}),
}


@pytest.fixture(scope="session")
def make_model():
    """``make_model(name, dtype, **changes)``: a tiny random model in training mode without dropout.

    All parameters are random, including biases and norms, so that leaving one out is noticed. ``kind`` is a subclass,
    and ``dropout`` sets every dropout probability in the configuration.
    """

    def make(name: str, dtype=torch.float64, *, kind=None, std: float = 0.3, dropout: float = 0.0, **changes):
        config_class, settings = _CONFIGS[name]
        drops = (key for key in config_class().to_dict() if key.endswith(("dropout", "pdrop")))
        settings = settings | dict.fromkeys(drops, dropout) | changes
        options = {
            key: settings.pop(key) for key in ("attn_implementation", "experts_implementation") if key in settings
        }
        torch.manual_seed(0)
        config = config_class(**settings)
        kind = hf.AutoModelForCausalLM if kind is None else kind
        build = kind.from_config if kind is hf.AutoModelForCausalLM else kind._from_config
        model = build(config, **options).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, dtype=torch.float64)
                parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else std * noise)
        return model

    return make


@pytest.fixture(scope="session")
def random_comparisons():
    """``random_comparisons((prompt, (response, ...)), ...)``: random comparisons with these lengths."""

    def make(*shapes: tuple[int, tuple[int, ...]], seed: int = 0) -> list[TokenizedComparison]:
        generator = torch.Generator().manual_seed(seed)

        def ids(length: int) -> list[int]:
            return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

        return [TokenizedComparison(ids(prompt), [ids(n) for n in responses]) for prompt, responses in shapes]

    return make


@pytest.fixture(scope="session")
def comparisons(random_comparisons) -> list[TokenizedComparison]:
    """Comparisons with 2 and 3 responses, one-token prompts and responses, and parts longer than a window."""
    return random_comparisons((11, (7, 19)), (1, (1, 4, 2)), (23, (9, 1)), (2, (1, 1)))


@pytest.fixture(scope="session")
def naive_logprobs():
    """``naive_logprobs(model, comparisons)``: the scored tokens' log-probabilities, ``[S]``, by the definition.

    Uses the model's own forward, one sequence at a time, with all logits.
    """

    def naive(model, comparisons: list[TokenizedComparison]) -> Tensor:
        found = []
        for comparison in comparisons:
            for response in comparison.response_ids:
                ids = torch.tensor([comparison.prompt_ids + response])
                logits = model(input_ids=ids, use_cache=False).logits[0]
                for place, token in enumerate(response, start=len(comparison.prompt_ids)):
                    found.append(torch.log_softmax(logits[place - 1], dim=-1)[token])
        return torch.stack(found)

    return naive


@pytest.fixture
def float64_everywhere(monkeypatch):
    """Make transformers upcast to float64 wherever it hard-codes fp32.

    Norms, softmaxes and routers upcast to fp32 even in a float64 model, so two exact computations of the same value
    may differ by 1e-7. With this fixture, both sides of a comparison upcast to float64 instead.
    """
    for config_class, _ in _CONFIGS.values():
        hf.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]  # import modules with these dtypes as defaults before they change
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.fixture(scope="session")
def chat_world(tmp_path_factory):
    """A folder with a tiny chat ``model`` that has dropout, and data for it.

    ``train.jsonl`` has 24 pairs, ``test.jsonl`` has 8, and ``sft.jsonl`` has the preferred answers of the 24.
    """
    folder = tmp_path_factory.mktemp("chat")
    rows = [
        {"prompt": f"What is {a} and {b}?", "chosen": f"It is {a + b}.", "rejected": f"I would say {a * b + 9}, {a}."}
        for a in range(4)
        for b in range(8)
    ]
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows[:24]]
    for name, part in (("train", rows[:24]), ("test", rows[24:]), ("sft", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tokenizer = make_tokenizer([text for row in rows for text in row.values()])
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=2, **special
    )
    hf.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def make_disk(tmp_path):
    """``make_disk("256k")``: a folder on a separate disk of that size."""
    folders = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk of {size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield make
    for folder in folders:
        subprocess.run(["umount", "-l", folder], check=True)
