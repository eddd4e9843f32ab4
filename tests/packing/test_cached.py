"""Sharing prompts through a model's own cache: values, gradients, neighbors, checkpointing, LoRA."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers
from benchmarks.architectures import build, comparisons, naive_logprobs, toy_config
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from simpo.packing.cached import NotShareableError, install_scans, outputs_at_scored
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import choose_path, policy_logprobs, prepare_policy, state_of, token_logprobs

# Gated DeltaNet, short convolutions, Mamba 1 and 2, with and without attention and experts, and other attention kinds.
STATES = [
    "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm2_moe", "falcon_h1", "nemotron_h", "granitemoehybrid",
    "bamba", "jamba", "zamba2", "olmo_hybrid", "mamba", "mamba2", "falcon_mamba",
]  # fmt: skip
# In older versions of transformers, these cache less than their layers need.
PATHS = dict.fromkeys(STATES, "cached")
if Version(transformers.__version__) < Version("5.23"):
    PATHS |= {"nemotron_h": "padded", "deepseek_v4": "padded"}
ATTENTION = [
    "bloom", "falcon", "gptj", "stablelm", "nemotron", "phimoe", "afmoe", "jetmoe", "llama4_text", "mpt",
    "deepseek_v32", "deepseek_v4",
]  # fmt: skip
for name in (*STATES, *ATTENTION):  # import modules with torch.float32 as a default before a fixture changes it
    MODEL_FOR_CAUSAL_LM_MAPPING[type(toy_config(name))]


def gradients(logps, model):
    weights = torch.linspace(0.5, 1.5, len(logps), dtype=logps.dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True, materialize_grads=True)


def assert_equal(found, expected, model, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    wanted = gradients(expected, model)
    largest = max(gradient.abs().max() for gradient in wanted)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, a, b in zip(names, gradients(found, model), wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("name", [*STATES, *ATTENTION])
def test_log_probabilities_and_gradients_match_the_models_own(name, float64_everywhere):
    """K = 1, 2 and 5, responses of one token, and a prompt shorter than the convolution window."""
    model, rows = build(name, torch.float64), comparisons()
    expected = naive_logprobs(model, rows)
    found = policy_logprobs(model, PackedBatch.build(rows))
    assert state_of(model).path == PATHS.get(name, "cached"), state_of(model).reasons
    assert_equal(found, expected, model, 1e-9)


@pytest.mark.parametrize(("name", "separately"), [("deepseek_v4", True), ("deepseek_v32", False), ("lfm2", False)])
def test_comparisons_are_separated_only_if_padding_changes_results(name, separately):
    """DeepSeek-V4's compressors close a window every few tokens, counted from the start of a row."""
    model = build(name)
    choose_path(model, PackedBatch.build(comparisons()))
    expected = ("cached", separately) if PATHS.get(name, "cached") == "cached" else ("padded", False)
    assert (state_of(model).path, state_of(model).separate_comparisons) == expected


@pytest.mark.parametrize("name", STATES)
def test_single_precision_matches_too(name):
    model, rows = build(name), comparisons(seed=1)
    expected = naive_logprobs(model, rows)
    found = policy_logprobs(model, PackedBatch.build(rows))
    assert state_of(model).path == PATHS[name]
    assert_equal(found, expected, model, 1e-4)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "mamba2", "falcon_h1", "jamba", "deepseek_v4"])
def test_gradient_checkpointing_changes_nothing(name, float64_everywhere):
    model, batch = build(name, torch.float64), PackedBatch.build(comparisons())
    choose_path(model, batch)
    plain = policy_logprobs(model, batch)
    expected = gradients(plain, model)
    model.gradient_checkpointing_enable()
    found = policy_logprobs(model, batch)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)
    for a, b in zip(gradients(found, model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert model.is_gradient_checkpointing


def test_checkpoints_are_one_comparison_long(monkeypatch):
    """What is stored for backward does not grow with the activations of a batch."""
    model, rows = build("lfm2"), comparisons()
    choose_path(model, PackedBatch.build(rows))
    model.gradient_checkpointing_enable()
    saved: list[int] = []
    pack = lambda tensor: saved.append(tensor.numel()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = outputs_at_scored(
            model, PackedBatch.build(rows), lambda **inputs: model.base_model(**inputs)[0], separately=False
        )
    weights = {parameter.numel() for parameter in model.parameters()}
    assert sum(size for size in saved if size not in weights) <= 4 * states.numel()


@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba", "gptj"])
@pytest.mark.parametrize("neighbor", ["other", "broken"])
def test_a_row_does_not_depend_on_its_neighbors(name, neighbor):
    """Bit-identical next to another row of the same size, even if that row produces non-finite values."""
    model = build(name).eval()
    first, second = comparisons(seed=2)[0], comparisons(seed=3)[0]
    rows = [first, second]
    prepare_policy(model)
    install_scans(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = float("nan")  # a token that no row contains yet
        expected = model(packed_batch=PackedBatch.build(rows), path="cached", compute=token_logprobs)
        if neighbor == "broken":
            second = TokenizedComparison([2] * len(second.prompt_ids), second.response_ids)
        else:
            second = comparisons(seed=4)[0]
        found = model(packed_batch=PackedBatch.build([first, second]), path="cached", compute=token_logprobs)
    mine = sum(map(len, first.response_ids))
    assert torch.equal(found[:mine], expected[:mine])
    assert not torch.equal(found[mine:], expected[mine:])
    assert found[mine:].isnan().all() == (neighbor == "broken")


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1"])
def test_adapters_train_through_the_cached_path(name, float64_everywhere):
    model = build(name, torch.float64)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "in_proj"])).double()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    rows = comparisons()
    expected = naive_logprobs(adapted, rows)
    found = policy_logprobs(adapted, PackedBatch.build(rows))
    assert state_of(prepare_policy(adapted)).path == "cached"
    assert_equal(found, expected, adapted, 1e-9)


@pytest.mark.parametrize("scored", [True, False])
def test_only_scored_tokens_are_returned(scored, float64_everywhere):
    model, (row, *_) = build("mamba2", torch.float64), comparisons()
    marks = [[(place % 2 == 0) == scored for place in range(len(ids))] for ids in row.response_ids]
    expected = naive_logprobs(model, [row])[torch.tensor([mark for each in marks for mark in each])]
    found = policy_logprobs(model, PackedBatch.build([TokenizedComparison(row.prompt_ids, row.response_ids, marks)]))
    assert_equal(found, expected, model, 1e-9)


def test_each_prompt_is_computed_once():
    """C * P + R * W tokens: three prompts padded to 37, eight responses padded to 12."""
    model, batch = build("lfm2"), PackedBatch.build(comparisons())
    choose_path(model, batch)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    policy_logprobs(model, batch)
    assert seen == [3 * 37, 8 * 12]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "falcon_h1", "jamba", "mamba2", "bloom"])
def test_a_step_leaves_no_tensors_to_the_garbage_collector(name, checkpointing):
    """Reference cycles would keep states, and the graphs behind them, on the GPU until the collector runs."""
    model, batch = build(name), PackedBatch.build(comparisons())
    assert choose_path(model, batch) == "cached"
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    policy_logprobs(model, batch).sum().backward()
    gc.collect()
    before = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
    gc.disable()
    try:
        policy_logprobs(model, batch).sum().backward()
        after = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


def test_a_state_without_gradient_is_detected(monkeypatch):
    """The log-probabilities are right, so only the backward pass reveals it."""
    model = build("mamba2")
    own = type(model.backbone.layers[0].mixer).forward

    def detached(self, hidden_states, cache_params=None, **kwargs):
        output = own(self, hidden_states, cache_params=cache_params, **kwargs)
        if cache_params is not None:
            layer = cache_params.layers[self.layer_idx]
            layer.recurrent_states[0] = layer.recurrent_states[0].detach()
        return output

    monkeypatch.setattr(type(model.backbone.layers[0].mixer), "forward", detached)
    assert choose_path(model, PackedBatch.build(comparisons())) == "padded"
    assert "gradients" in state_of(model).reasons[-1]


def test_a_layer_that_caches_nothing_is_detected():
    model = build("recurrent_gemma")  # keeps its states outside the cache
    prepare_policy(model)
    with pytest.raises(NotShareableError, match="cache"):
        model(packed_batch=PackedBatch.build(comparisons()), path="cached", compute=token_logprobs)
    assert choose_path(model, PackedBatch.build(comparisons())) == "padded"
