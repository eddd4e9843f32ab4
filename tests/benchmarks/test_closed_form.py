"""The fixed points of online training are zeros of the expected gradient."""

from __future__ import annotations

import pytest
import torch
from benchmarks.answer_space import AnswerSpace, fixed_point_with_kl_in_the_loss, group_advantages
from benchmarks.closed_form import Task, measure

from simpo.objectives.policy_gradient import kl_estimate


def test_an_answer_space_lists_every_answer_once():
    space = AnswerSpace(11, 3)
    assert len(set(space.answers)) == 1 + 10 + 100 * 11 and space.shape == (1 + 10 + 100, 11)
    probabilities = space.probabilities(torch.randn(space.shape, dtype=torch.float64))
    assert probabilities.sum() == pytest.approx(1)
    # given each context and next token, the expectation of 1 is 1
    logits, ones = torch.zeros(space.shape, dtype=torch.float64), torch.ones(1111, dtype=torch.float64)
    assert torch.allclose(space.conditional_means(logits, ones), torch.ones_like(logits))


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_expected_gradient_is_0_at_the_fixed_point(estimator, by_length):
    """Differentiates the expectation over all answers, with GRPO's advantages for large K."""
    space = AnswerSpace(5, 3)
    start = torch.randn(space.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rewards = torch.rand(len(space.answers), generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def advantages(probabilities):
        centered = rewards - (probabilities * rewards).sum()
        return centered / (probabilities * centered**2).sum().sqrt()

    fixed = fixed_point_with_kl_in_the_loss(space, start, advantages, 3.0, estimator, by_length=by_length)

    def gradient(logits):
        logits = logits.clone().requires_grad_()
        logps, reference = space.token_logps(logits), space.token_logps(start)
        probabilities = logps.detach().sum(-1).exp()
        weights = 1 / space.mask.sum(-1).double() if by_length else torch.ones(len(probabilities))
        loss = 3.0 * kl_estimate(logps, reference, estimator) - advantages(probabilities)[:, None] * logps
        (probabilities * weights * loss.sum(-1)).sum().backward()
        return logits.grad.abs().max()

    assert gradient(fixed) < 1e-5
    assert gradient(start) > 1e-2


def test_expected_group_advantages_match_enumerated_groups():
    rewards, k = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), 4
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    groups = torch.cartesian_prod(*[torch.arange(3)] * (k - 1))  # all possible values of the other answers
    weights = probabilities[groups].prod(1)
    expected = []
    for own in rewards:
        everything = torch.cat([own.expand(len(groups), 1), rewards[groups]], dim=1)
        expected.append((weights * (own - everything.mean(1)) / (everything.std(1) + 1e-6)).sum())
    found = group_advantages(rewards, k, draws=20_000)(probabilities)
    assert torch.allclose(found, torch.stack(expected), atol=0.02)


def test_trained_on_exact_expectations_a_network_reaches_the_fixed_point():
    found = measure("reinforce, k2 in the loss", 2.0, Task(tokens=11, max_length=3), answers=0, steps=60, exact=True)
    assert found["start"] > 0.1 and found["trained"] < 0.05
