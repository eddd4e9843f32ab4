"""Rotary frequencies that depend on sequence length: every row against a fresh copy of the model, on its own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from packaging import version

from simpo.packing.layout import PackedBatch, Span, TokenizedComparison
from simpo.packing.model import choose_path, policy_forward, policy_logprobs, state_of
from simpo.packing.rope import LengthRule
from simpo.packing.scoring import score_responses
from simpo.training.batches import row_sizes

BORDER = 24
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": BORDER, "factor": 4.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def _longrope(head_dim: int) -> dict:
    return _LONG | {"short_factor": [1.0] * (head_dim // 2), "long_factor": [4.0] * (head_dim // 2)}


_DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
MODELS = {
    "phi3 longrope": ("phi3", {"rope_parameters": _longrope(8)}),
    "llama longrope": ("llama", {"rope_parameters": _longrope(8)}),
    "llama dynamic": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": BORDER}),
    "qwen3 dynamic": ("qwen3", {"rope_parameters": _DYNAMIC, "max_position_embeddings": BORDER}),
    "gemma3, both": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": _longrope(8), "full_attention": _DYNAMIC | {"factor": 3.0}}}
        | {"max_position_embeddings": BORDER + 3},
    ),
    "gemma3, one of two": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": _DEFAULT, "full_attention": _longrope(8)}},
    ),
}
# prompt and responses: short, beyond the border, across it in both orders, exactly on it, and three responses
SHAPES = [(4, (5, 3)), (20, (9, 14)), (15, (4, 20)), (15, (20, 4)), (14, (10, 11)), (12, (3, 30, 7)), (30, (3,))]


@pytest.fixture(params=MODELS)
def model(request, make_model):
    name, changes = MODELS[request.param]
    if name == "gemma3" and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("longrope per type of layer fails inside transformers 5.17, with or without this package")
    return make_model(name, **changes).eval()


@pytest.fixture
def rows(random_comparisons):
    return random_comparisons(*SHAPES)


@pytest.fixture
def alone(model, rows, naive_logprobs):
    """Token log-probabilities of every response from a copy of the model that has computed nothing else."""
    return [naive_logprobs(copy.deepcopy(model), [one]).detach() for one in _singles(rows)]


def _singles(rows):
    return [TokenizedComparison(row.prompt_ids, [response]) for row in rows for response in row.response_ids]


def _sums(alone):
    return torch.stack([logps.sum() for logps in alone]).float()


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_log_probabilities_do_not_depend_on_the_batch(model, rows, alone, path):
    choose_path(model, PackedBatch.build(rows))
    assert (state_of(model).path, state_of(model).separate_rows) == ("packed", False)
    with torch.no_grad():
        together = policy_logprobs(model, PackedBatch.build(rows), path=path)
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
        for budget in (130, 170, 1000):
            found = score_responses(model, rows, max_batch_tokens=budget, path=path)
            torch.testing.assert_close(found.logp.float(), _sums(alone), rtol=1e-6, atol=1e-5)
        # nor on the order of earlier computations
        for number in (1, 0, 6, 0):
            found = score_responses(model, [rows[number]], path=path).logp.float()
            start = sum(len(row.response_ids) for row in rows[:number])
            expected = _sums(alone)[start : start + len(found)]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_the_batch(model, rows, path, checkpointing, naive_logprobs):
    weights = torch.randn(sum(len(row.response_ids) for row in rows), generator=torch.Generator().manual_seed(1))
    expected: list = [0.0] * len(list(model.parameters()))
    for weight, one in zip(weights, _singles(rows), strict=True):
        fresh = copy.deepcopy(model)
        loss = naive_logprobs(fresh, [one]).sum() * weight
        expected = [a + b for a, b in zip(expected, torch.autograd.grad(loss, list(fresh.parameters())), strict=True)]
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = (policy_forward(model, PackedBatch.build(rows), path=path).logp * weights).sum()
    policy_logprobs(model, PackedBatch.build(rows[:1]), path=path)  # another forward before backward
    for (name, _), a, b in zip(
        model.named_parameters(), torch.autograd.grad(found, list(model.parameters())), expected, strict=True
    ):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name


def test_a_prompt_is_repeated_only_if_frequencies_differ():
    rule = LengthRule(thresholds=(BORDER,))
    assert rule.split(Span(15, (9, 4, 10, 11, 2))) == [Span(15, (9, 4)), Span(15, (10, 11)), Span(15, (2,))]
    rule = LengthRule(dynamic_above=BORDER)
    assert rule.split(Span(15, (9, 4, 10, 10, 11))) == [Span(15, (9, 4)), Span(15, (10, 10)), Span(15, (11,))]


@pytest.mark.parametrize("rule", [LengthRule((BORDER,)), LengthRule(dynamic_above=BORDER), LengthRule((9, 30), 20)])
def test_repeated_prompts_are_counted(rule, rows):
    data = Dataset.from_list([{"prompt_ids": row.prompt_ids, "response_ids": row.response_ids} for row in rows])
    expected = [sum(s.total for s in rule.split(Span(p, tuple(r)))) for p, r in SHAPES]
    assert row_sizes(data, "packed", rule).lengths.tolist() == expected


def test_models_with_fixed_frequencies_are_left_alone(make_model, comparisons):
    model = make_model("llama")
    choose_path(model, PackedBatch.build(comparisons))
    assert state_of(model).lengths is None
    assert all("forward" not in module.__dict__ for module in model.modules() if hasattr(module, "rope_type"))


def test_a_copy_uses_its_own_frequencies(make_model, rows):
    """Copies of a bound model, as trainers and users make them."""
    name, changes = MODELS["llama dynamic"]
    model = make_model(name, **changes).eval()
    with torch.no_grad():
        expected = score_responses(model, rows).logp
        copied = copy.deepcopy(model)
        model.model.rotary_emb.original_inv_freq.zero_()
        torch.testing.assert_close(score_responses(copied, rows).logp, expected)
        assert not torch.allclose(score_responses(model, rows).logp, expected)
