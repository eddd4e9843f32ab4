"""PPO's formulas against float64 references written token by token from the papers."""

from __future__ import annotations

import math

import pytest
import torch

from simpo.objectives.policy_gradient import advantages, whiten
from simpo.objectives.ppo import (
    PPO,
    ScoreScale,
    adapt_kl_coefficient,
    explained_variance,
    gae,
    token_rewards,
    value_loss,
)

LENGTHS = (3, 1, 5, 2, 4, 6)
SEGMENT = torch.tensor([number for number, length in enumerate(LENGTHS) for _ in range(length)])
PLACES = [[t for t, s in enumerate(SEGMENT.tolist()) if s == number] for number in range(len(LENGTHS))]


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_advantages(rewards, values, discount, lam):
    """Equation 16 of the GAE paper: the discounted sum of all later TD residuals."""
    found = {}
    for tokens in PLACES:
        deltas = {}
        for t in tokens:
            following = values[t + 1].item() if t + 1 in tokens else 0.0
            deltas[t] = rewards[t].item() + discount * following - values[t].item()
        for t in tokens:
            found[t] = sum((discount * lam) ** (k - t) * deltas[k] for k in tokens if k >= t)
    return [found[t] for t in range(len(SEGMENT))]


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_generalized_advantages_match_the_definition(discount, lam):
    rewards, values = draw(2, len(SEGMENT))
    found, returns = gae(rewards, values, SEGMENT, discount=discount, lam=lam)
    assert found.tolist() == pytest.approx(naive_advantages(rewards, values, discount, lam), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(returns, found + values, rtol=1e-12, atol=1e-12)


def test_with_lambda_1_an_advantage_is_the_discounted_return_minus_the_value():
    rewards = torch.ones(len(SEGMENT), dtype=torch.float64)
    found, _ = gae(rewards, torch.zeros_like(rewards), SEGMENT, discount=0.5, lam=1.0)
    for tokens in PLACES:
        assert found[tokens[0]].item() == pytest.approx(2 * (1 - 0.5 ** len(tokens)))


def test_the_last_token_gets_the_score_and_every_token_the_penalty():
    scores, penalty = torch.arange(6.0, dtype=torch.float64), draw(len(SEGMENT))
    found = token_rewards(scores, penalty, SEGMENT)
    for score, tokens in zip(scores.tolist(), PLACES, strict=True):
        expected = [-penalty[t].item() for t in tokens]
        expected[-1] += score
        assert found[tokens].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("whitened", [False, True])
def test_scores_become_advantages_and_returns(whitened):
    scores, (penalty, values) = draw(6, seed=2), draw(2, len(SEGMENT), seed=3)
    rewards = token_rewards(scores, penalty, SEGMENT)
    if whitened:  # whitening here keeps the mean
        mean = rewards.mean()
        rewards = mean + (rewards - mean) / ((rewards - mean) ** 2).mean().sqrt()
    found, returns = PPO(0.9, 0.8, whiten_rewards=whitened).estimate(scores, penalty, values, SEGMENT)
    expected = naive_advantages(rewards, values, 0.9, 0.8)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values.tolist(), strict=True)], rel=1e-9)


def test_a_perfect_value_function_leaves_no_advantage():
    rewards = draw(len(SEGMENT))
    values = torch.stack([rewards[[k for k in tokens if k >= t]].sum() for tokens in PLACES for t in tokens])
    for lam in (0.0, 0.6, 1.0):
        found, returns = gae(rewards, values, SEGMENT, discount=1.0, lam=lam)
        assert found.abs().max() < 1e-12 and (returns - values).abs().max() < 1e-12


def test_whitening_can_keep_the_mean():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    expected = [4 + (value - 4) / math.sqrt((9 + 4 + 0 + 25) / 4) for value in values.tolist()]
    assert whiten(values, keep_mean=True).tolist() == pytest.approx(expected)


def test_the_clipped_value_loss_and_its_gradient_match_the_definition():
    old, returns = torch.zeros(5), torch.tensor([1.0, 1.0, -1.0, 0.1, math.nan])
    values = torch.tensor([0.5, 0.1, 0.5, 0.05, 3.0], requires_grad=True)
    found = value_loss(values, old, returns, clip=0.2)
    assert found.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2, 0.5 * 1.5**2, 0.5 * 0.05**2, 0])
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert gradient.tolist() == pytest.approx([0.0, -0.9, 1.5, -0.05, 0.0])


def test_explained_variance_matches_its_definition():
    returns = torch.tensor([1.0, 2.0, 4.0, 9.0, math.nan], dtype=torch.float64)
    values = torch.tensor([1.5, 1.5, 4.5, 8.0, 100.0], dtype=torch.float64)
    errors = [-0.5, 0.5, -0.5, 1.0]
    mean = sum(errors) / 4
    expected = 1 - sum((error - mean) ** 2 for error in errors) / (9 + 4 + 0 + 25)
    assert explained_variance(values, returns) == pytest.approx(expected, rel=1e-12)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full_like(returns, 4.0), returns) == pytest.approx(0)
    assert math.isnan(explained_variance(values[:3], torch.full((3,), 0.1)))
    assert math.isnan(explained_variance(values[4:], returns[4:]))


def test_the_adaptive_kl_coefficient_moves_towards_its_target():
    raised = adapt_kl_coefficient(0.2, 12.0, 256, target=6.0, horizon=10_000)  # an error of 1 is clipped to 0.2
    assert raised == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000), rel=1e-12)
    assert adapt_kl_coefficient(raised, 5.4, 256, target=6.0, horizon=10_000) == pytest.approx(
        raised * (1 - 0.1 * 0.0256)
    )
    assert adapt_kl_coefficient(0.2, -5.0, 100, target=1.0, horizon=1000) == pytest.approx(0.2 * (1 - 0.02))


def test_scores_are_normalized_by_the_start_models_and_clipped():
    scale = ScoreScale.of(torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64))
    std = math.sqrt((9 + 4 + 0 + 25) / 4)
    assert [scale.apply(score) for score in (4.0, 9.0)] == pytest.approx([0, 5 / std], abs=1e-12)
    assert [scale.apply(score, clip=1.0) for score in (-9.0, 5.0, 9.0)] == pytest.approx([-1, 1 / std, 1])
    with pytest.raises(ValueError, match=r"0\.1"):  # their mean is not exactly 0.1
        ScoreScale.of(torch.full((3,), 0.1, dtype=torch.float64))


def test_a_value_baseline_does_not_work_on_whole_answers():
    with pytest.raises(ValueError, match="value"):
        advantages(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), "value")
