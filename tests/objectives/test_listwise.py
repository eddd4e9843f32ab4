"""Plackett-Luce: the likelihood of a ranking against a naive product over positions."""

from __future__ import annotations

import math

import pytest
import torch

from simpo.objectives import OBJECTIVES, Responses
from simpo.training.batches import OrderedPairs

# Two, three and four responses, the last with two tied scores.
COUNTS = [2, 3, 4]
SCORES = [2.0, 1.0, 5.0, 3.0, 1.0, 4.0, 3.0, 3.0, 0.5]
NAMES = ["listwise", "listwise_dpo"]


@pytest.fixture
def responses() -> Responses:
    generator = torch.Generator().manual_seed(0)
    logp, ref = -40 * torch.rand(2, 9, generator=generator, dtype=torch.float64)
    return Responses(logp.requires_grad_(), torch.arange(3, 12).double(), ref)


def naive(rewards: list[float], scores: list[float]) -> float:
    """Return the loss with each response against itself and everything worse."""
    total = 0.0
    for reward, score in zip(rewards, scores, strict=True):
        worse = [other for other, lower in zip(rewards, scores, strict=True) if lower < score]
        total -= math.log(math.exp(reward) / (math.exp(reward) + sum(map(math.exp, worse))))
    return total


@pytest.mark.parametrize("name", NAMES)
def test_rankings_match_the_naive_likelihood(name, responses):
    row = OBJECTIVES[name].with_hyperparameters(beta=0.7)
    pairs = OrderedPairs.of(torch.tensor(COUNTS), torch.tensor(SCORES))
    found = row.comparisons(responses, pairs)
    rewards, start, expected = row.reward(responses).tolist(), 0, []
    for count in COUNTS:
        expected.append(naive(rewards[start : start + count], SCORES[start : start + count]))
        start += count
    assert found.tolist() == pytest.approx(expected, rel=1e-11, abs=0)
    (gradient,) = torch.autograd.grad(found.sum(), responses.logp)
    assert (gradient[[0, 2, 5]] < 0).all()  # the best response is raised and the worst lowered
    assert (gradient[[1, 4, 8]] > 0).all()


def test_a_ranking_matches_its_likelihood_by_hand():
    """Rewards ln 6, ln 3 and ln 1: 6/10 * 3/4 = 0.45."""
    logp = torch.tensor([math.log(6), math.log(3), 0.0], dtype=torch.float64) - 10
    y = Responses(logp, torch.ones(3, dtype=torch.float64), torch.full((3,), -10.0, dtype=torch.float64))
    pairs = OrderedPairs.of(torch.tensor([3]))
    for name in NAMES:
        loss = OBJECTIVES[name].with_hyperparameters(beta=1.0).comparisons(y, pairs)
        assert loss.item() == pytest.approx(-math.log(0.45), rel=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_equals_a_ranking_of_two(name, responses):
    row, pairs = OBJECTIVES[name], OrderedPairs.of(torch.tensor([2, 2, 2, 2]))
    y = responses.take(torch.arange(8))
    expected = row.pair(y.take(pairs.better), y.take(pairs.worse))
    torch.testing.assert_close(row.comparisons(y, pairs), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_rewards_give_finite_losses(name):
    logp = torch.tensor([-1e4, -1.0, -5e3], requires_grad=True)
    y = Responses(logp, torch.ones(3), torch.zeros(3))
    loss = OBJECTIVES[name].comparisons(y, OrderedPairs.of(torch.tensor([3])))
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
