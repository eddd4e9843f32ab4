"""Policy gradients against float64 references written token by token from the papers."""

from __future__ import annotations

import math

import pytest
import torch

from simpo.objectives.policy_gradient import (
    POLICY_GRADIENTS,
    Rollout,
    advantages,
    kl_estimate,
    whiten,
)

LENGTHS = (3, 1, 5, 2, 4, 6)
GROUP = (0, 0, 0, 1, 1, 1)


@pytest.fixture
def rollout():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    segment = torch.tensor([index for index, length in enumerate(LENGTHS) for _ in range(length)])
    behavior = -draw(len(segment)).abs()
    logp = (behavior + 0.4 * draw(len(segment))).requires_grad_()
    return Rollout(logp, behavior, draw(len(LENGTHS))[segment], segment, len(LENGTHS))


def tokens_of(rollout: Rollout) -> list[list[int]]:
    return [[t for t, s in enumerate(rollout.segment.tolist()) if s == r] for r in range(rollout.responses)]


def naive_loss(name: str, rollout: Rollout, denominator: float) -> torch.Tensor:
    row, losses = POLICY_GRADIENTS[name], []
    for tokens in tokens_of(rollout):
        differences = [rollout.logp[t] - rollout.behavior_logp[t] for t in tokens]
        if row.ratio == "token":
            ratios = [math.e**d for d in differences]
        elif row.ratio == "sequence":
            ratios = [math.e ** sum(differences)]
        else:
            ratios = [math.e ** (sum(differences) / len(tokens))] * len(tokens)
        terms = []
        for ratio, token in zip(ratios, tokens, strict=False):
            advantage = rollout.advantage[token]
            clipped = min(max(ratio, 1 - row.clip_low), 1 + row.clip_high)
            terms.append(-min(ratio * advantage, clipped * advantage))
        divisor = {"sum": 1, "length": len(tokens)}.get(row.normalization, denominator)
        losses.append(sum(terms) / divisor)
    return torch.stack(losses)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_losses_and_gradients_match_the_papers(name, rollout):
    found = POLICY_GRADIENTS[name].loss(rollout, denominator=3.5)
    expected = naive_loss(name, rollout, 3.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, 1 + rollout.responses, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found * weights).sum(), rollout.logp)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), rollout.logp)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_at_the_behavior_policy_nothing_is_clipped_and_the_gradient_is_reinforces(name, rollout):
    same = Rollout(
        rollout.behavior_logp.clone().requires_grad_(),
        rollout.behavior_logp,
        rollout.advantage,
        rollout.segment,
        rollout.responses,
    )
    row = POLICY_GRADIENTS[name]
    assert (row.ratios(same) == 1).all() and not row.clipped(same).any()
    (gradient,) = torch.autograd.grad(row.loss(same, denominator=3.5).sum(), same.logp)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)[same.segment]
    divisor = {"sum": torch.ones_like(lengths), "length": lengths}.get(row.normalization, torch.full_like(lengths, 3.5))
    torch.testing.assert_close(gradient, -same.advantage / divisor, rtol=1e-12, atol=1e-12)


def test_the_clip_fraction_counts_tokens_without_a_gradient(rollout):
    row = POLICY_GRADIENTS["dr_grpo"]
    (gradient,) = torch.autograd.grad(row.loss(rollout, denominator=1.0).sum(), rollout.logp)
    share = (gradient == 0).double().mean()
    assert 0 < share < 1
    assert row.clipped(rollout).double().mean() == pytest.approx(share.item())


def test_advantages_match_each_baseline():
    rewards = torch.tensor([1.0, 4.0, 2.5, -1.0, 0.5, 0.25], dtype=torch.float64)
    group = torch.tensor(GROUP)
    assert advantages(rewards, group, "batch").tolist() == pytest.approx((rewards - rewards.mean()).tolist(), abs=1e-12)
    others = [[j for j in range(6) if GROUP[j] == GROUP[i] and j != i] for i in range(6)]
    expected = [rewards[i].item() - sum(rewards[j].item() for j in others[i]) / 2 for i in range(6)]
    assert advantages(rewards, group, "leave_one_out").tolist() == pytest.approx(expected, abs=1e-12)
    for start in (0, 3):
        mine = rewards[start : start + 3]
        plain = advantages(rewards, group, "group")[start : start + 3]
        scaled = advantages(rewards, group, "group", scale_by_std=True)[start : start + 3]
        assert plain.tolist() == pytest.approx((mine - mine.mean()).tolist(), abs=1e-12)
        assert scaled.tolist() == pytest.approx(((mine - mine.mean()) / (mine.std() + 1e-6)).tolist(), abs=1e-12)


def test_equal_rewards_give_zero_advantage():
    found = advantages(
        torch.full((4,), 0.7, dtype=torch.float64), torch.tensor([0, 0, 1, 1]), "group", scale_by_std=True
    )
    assert found.abs().max() < 1e-9


@pytest.mark.parametrize("baseline", ["leave_one_out", "group"])
def test_a_single_response_has_no_group_baseline(baseline):
    with pytest.raises(ValueError, match=baseline):
        advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), baseline)


def test_kl_estimators_and_their_gradients_match_the_exact_kl():
    """Over a whole distribution: k1 and k3 give the exact value, and k2 as a loss gives the exact gradient."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    probabilities = logp.exp()
    exact = (probabilities * (logp - ref)).sum()
    for name in ("k1", "k3"):
        assert (probabilities * kl_estimate(logp, ref, name)).sum().item() == pytest.approx(exact.item(), rel=1e-12)
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    samples = (
        probabilities.detach() * kl_estimate(logp, ref, "k2")
    ).sum()  # the gradient of the loss, not of the sampling
    (found,) = torch.autograd.grad(samples, logits, retain_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    (none,) = torch.autograd.grad((probabilities.detach() * kl_estimate(logp, ref, "k1")).sum(), logits)
    assert none.abs().max() < 1e-12  # on average, k1 in a loss has no effect


def test_whitening_standardizes_values():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    expected = [(value - 4) / math.sqrt((9 + 4 + 0 + 25) / 4) for value in values.tolist()]
    assert whiten(values).tolist() == pytest.approx(expected)
    # values with a standard deviation of 1e-6, the epsilon that keeps the quotient finite
    close = whiten(torch.tensor([0.0, 2e-6], dtype=torch.float64))
    assert close.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
