"""``score_responses`` against naive sums, for every path and budget."""

from __future__ import annotations

import pytest
import torch

from simpo import score_responses
from simpo.errors import SimpoError

SHAPES = ((9, (3, 7)), (1, (1, 4, 2)), (20, (2, 5)), (3, (6,)), (4, (1, 1)))


@pytest.fixture
def rows(random_comparisons):
    return random_comparisons(*SHAPES)


def naive_sums(naive_logprobs, model, rows):
    sizes = [len(response) for row in rows for response in row.response_ids]
    return torch.stack([part.sum() for part in naive_logprobs(model, rows).split(sizes)])


@pytest.mark.parametrize("path", ["auto", "packed", "padded"])
@pytest.mark.parametrize("budget", [27, 50, 16384])
def test_values_and_their_order_match_the_naive_sums(
    path, budget, rows, make_model, naive_logprobs, float64_everywhere
):
    budget = max(budget, 54) if path == "padded" else budget  # the longest comparison has 2 * (20 + 5) padded tokens
    model = make_model("qwen2")
    expected = naive_sums(naive_logprobs, model, rows)
    found = score_responses(model, rows, max_batch_tokens=budget, path=path)
    torch.testing.assert_close(found.logp, expected, rtol=0, atol=1e-9)
    assert found.length.tolist() == [3, 7, 1, 4, 2, 2, 5, 6, 1, 1]
    assert found.ref_logp is None
    parameters = list(model.parameters())
    weight = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found.logp * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "path", "budget", "passes"),
    [("llama", "auto", 27, 1), ("llama", "padded", 60, 1), ("falcon", "auto", 60, 2)],
)
def test_no_forward_exceeds_the_budget(name, path, budget, passes, rows, make_model):
    """Counted where tokens enter the model, padding included. Through a cache, a batch takes two passes."""
    model = make_model(name)
    score_responses(model, rows, path=path)  # runs the self-check first
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    score_responses(model, rows, max_batch_tokens=budget, path=path)
    assert 1 < len(seen) / passes < len(rows)
    assert max(seen) <= budget


def test_one_forward_is_enough_if_everything_fits(rows, make_model):
    model = make_model("llama")
    score_responses(model, rows)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    score_responses(model, rows)
    assert seen == [sum(prompt + sum(responses) for prompt, responses in SHAPES)]


@pytest.mark.parametrize(("path", "budget", "tokens"), [("packed", 26, 27), ("padded", 49, 50), ("auto", 26, 27)])
def test_a_budget_below_the_longest_row_names_it(path, budget, tokens, rows, make_model):
    with pytest.raises(SimpoError, match=rf"max_batch_tokens: {budget} .*row 2, {tokens} tokens"):
        score_responses(make_model("llama"), rows, max_batch_tokens=budget, path=path)


def test_scoring_computes_no_gradients(rows, make_model):
    model = make_model("llama").train()
    with torch.no_grad():
        found = score_responses(model, rows)
    assert not found.logp.requires_grad
    assert model.training


def test_scoring_nothing_is_an_error(make_model):
    with pytest.raises(ValueError, match="at least one"):
        score_responses(make_model("llama"), [])
