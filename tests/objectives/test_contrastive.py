"""NCA and InfoNCA for scored responses, against float64 sums following the authors' code, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

from simpo.objectives import OBJECTIVES, Mixture, Responses
from simpo.training.batches import OrderedPairs

# Two, three and four responses, the last with two tied scores, and a pair without scores.
COUNTS = [2, 3, 4, 2]
SCORES = [2.0, 1.0, 5.0, 3.0, 1.0, 4.0, 3.0, 3.0, 0.5, 0.0, -math.inf]
BETA, TEMPERATURE = 0.3, 1.7


@pytest.fixture
def responses() -> Responses:
    generator = torch.Generator().manual_seed(0)
    logp, ref = -40 * torch.rand(2, 11, generator=generator, dtype=torch.float64)
    return Responses(logp.requires_grad_(), torch.arange(3, 14).double(), ref)


def comparisons() -> OrderedPairs:
    return OrderedPairs.of(torch.tensor(COUNTS), torch.tensor(SCORES))


def naive(name: str, logps: list[float], refs: list[float], scores: list[float], temperature: float) -> float:
    """Return the loss of one prompt, one response at a time."""
    rewards = [BETA * (logp - ref) for logp, ref in zip(logps, refs, strict=True)]
    exponentials = [math.exp((score - max(scores)) / temperature) for score in scores]
    labels = [one / sum(exponentials) for one in exponentials]
    total = 0.0
    for label, reward in zip(labels, rewards, strict=True):
        if name == "info_nca":
            total -= label * (reward - math.log(sum(map(math.exp, rewards))))
        else:
            total += label * math.log1p(math.exp(-reward)) + math.log1p(math.exp(reward)) / len(rewards)
    return total


@pytest.mark.parametrize("temperature", [TEMPERATURE, 1e-3])
@pytest.mark.parametrize("name", ["listwise_nca", "info_nca"])
def test_scored_responses_match_the_naive_loss(name, temperature, responses):
    row = OBJECTIVES[name].with_hyperparameters(beta=BETA, score_temperature=temperature)
    scores = torch.tensor(SCORES, dtype=torch.float64)
    found = row.comparisons(responses, comparisons(), scores=scores)
    (gradient,) = torch.autograd.grad(found.sum(), responses.logp)
    logps, refs = responses.logp.tolist(), responses.ref_logp.tolist()

    def loss(moved: list[float]) -> list[float]:
        ends = [sum(COUNTS[: k + 1]) for k in range(len(COUNTS))]
        parts = [slice(end - count, end) for end, count in zip(ends, COUNTS, strict=True)]
        return [naive(name, moved[part], refs[part], SCORES[part], temperature) for part in parts]

    assert found.tolist() == pytest.approx(loss(logps), rel=1e-11)
    for k in range(len(logps)):
        ends = [sum(loss([*logps[:k], logps[k] + step, *logps[k + 1 :]])) for step in (1e-5, -1e-5)]
        assert gradient[k].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["listwise_nca", "info_nca"])
def test_a_pair_without_scores_equals_the_paired_loss(name, responses):
    row, pairs = OBJECTIVES[name].with_hyperparameters(beta=BETA), OrderedPairs.of(torch.tensor([2] * 5))
    y = responses.take(torch.arange(10))
    expected = row.pair(y.take(pairs.better), y.take(pairs.worse))
    torch.testing.assert_close(row.comparisons(y, pairs), expected, rtol=1e-12, atol=1e-14)
    same = {"listwise_nca": "nca", "info_nca": "dpo"}[name]
    other = OBJECTIVES[same].with_hyperparameters(beta=BETA).comparisons(y, pairs)
    torch.testing.assert_close(other, expected, rtol=1e-12, atol=1e-14)


def test_the_gradient_vanishes_at_the_soft_labels():
    """InfoNCA is minimal where the softmax of the rewards equals that of the scores over the temperature."""
    scores = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)
    logp = (scores / TEMPERATURE / BETA - 50).requires_grad_()
    y = Responses(logp, torch.ones(3, dtype=torch.float64), torch.full((3,), -45.0, dtype=torch.float64))
    row = OBJECTIVES["info_nca"].with_hyperparameters(beta=BETA, score_temperature=TEMPERATURE)
    loss = row.comparisons(y, OrderedPairs.of(torch.tensor([3])), scores=scores)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["listwise_nca", "info_nca"])
def test_extreme_rewards_give_finite_losses(name):
    logp = torch.tensor([-1e6, -1.0, -5e5], requires_grad=True)
    y, scores = Responses(logp, torch.ones(3), torch.zeros(3)), torch.tensor([9.0, 5.0, 1.0], dtype=torch.float64)
    row = OBJECTIVES[name].with_hyperparameters(score_temperature=1e-4)
    loss = row.comparisons(y, OrderedPairs.of(torch.tensor([3])), scores=scores)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_a_mixture_passes_scores_to_the_part_that_needs_them(responses):
    scores, mixture = torch.tensor(SCORES, dtype=torch.float64), Mixture.of({"dpo": 0.5, "info_nca": 2.0})
    found = mixture.comparisons(responses, comparisons(), scores=scores)
    own = OBJECTIVES["info_nca"].comparisons(responses, comparisons(), scores=scores)
    expected = 0.5 * OBJECTIVES["dpo"].comparisons(responses, comparisons()) + 2 * own
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
