"""SimPO in detail: the worked example, links, label smoothing, and analytic gradients."""

from __future__ import annotations

import math

import pytest
import torch

from simpo.objectives import OBJECTIVES, Responses, sft_term

SIMPO = OBJECTIVES["simpo"]
# averages of chosen and rejected: equal, typical, decided either way, far apart
AVERAGES = [(-0.5, -0.5), (-0.25, -0.6), (-1.2, -0.3), (-1e-7, -50.0), (-50.0, -1e-7), (-0.1, -8.0)]
BETAS = [0.1, 2.0, 10.0]
RATIOS = [0.0, 0.5, 1.6]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def responses(*averages: float, lengths=(3, 7, 250)) -> Responses:
    length = torch.tensor([lengths[i % len(lengths)] for i in range(len(averages))], dtype=torch.float64)
    return Responses((torch.tensor(averages, dtype=torch.float64) * length).requires_grad_(), length)


def test_the_worked_example_is_reproduced():
    """Eight tokens at beta 2 give the reward -0.6436; rewards -0.5 and -1.2 with gamma 0.5 give the loss 0.598."""
    tokens = torch.tensor([0.7, 0.8, 0.9, 0.6, 0.5, 0.9, 0.8, 0.7], dtype=torch.float64)
    y = Responses(tokens.log().sum()[None], torch.tensor([8.0]))
    assert SIMPO.reward(y, beta=2.0).item() == pytest.approx(-0.6436, abs=5e-5)
    chosen, rejected = Responses(torch.tensor([-0.25]), torch.ones(1)), Responses(torch.tensor([-0.6]), torch.ones(1))
    assert SIMPO.reward(chosen, beta=2.0).item() == pytest.approx(-0.5)
    assert SIMPO.reward(rejected, beta=2.0).item() == pytest.approx(-1.2)
    for hyperparameters in ({"gamma_beta_ratio": 0.25}, {"gamma": 0.5}):
        resolved = SIMPO.resolve({"beta": 2.0} | hyperparameters)
        loss = SIMPO.loss(chosen, rejected, **resolved)
        assert loss.item() == pytest.approx(0.598, abs=5e-4)
        assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.2)), rel=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_losses_and_gradients_match_the_formula(beta, ratio, smoothing):
    w, y = responses(*(a for a, _ in AVERAGES)), responses(*(b for _, b in AVERAGES), lengths=(5, 1, 80))
    losses = SIMPO.loss(w, y, beta=beta, gamma_beta_ratio=ratio, label_smoothing=smoothing)
    assert losses.shape == (len(AVERAGES),)
    margins = [beta * a - beta * b - beta * ratio for a, b in AVERAGES]
    expected = [(1 - smoothing) * softplus(-m) + smoothing * softplus(m) for m in margins]
    assert losses.tolist() == pytest.approx(expected, rel=1e-11)
    # d loss / d margin = smoothing - sigmoid(-margin); d margin / d logp = +-beta / length
    slopes = [smoothing - 1 / (1 + math.exp(m)) if m < 700 else smoothing for m in margins]
    found_w, found_y = torch.autograd.grad(losses.sum(), (w.logp, y.logp))
    assert found_w.tolist() == pytest.approx(
        [s * beta / n for s, n in zip(slopes, w.length.tolist(), strict=True)], rel=1e-9, abs=1e-18
    )
    assert found_y.tolist() == pytest.approx(
        [-s * beta / n for s, n in zip(slopes, y.length.tolist(), strict=True)], rel=1e-9, abs=1e-18
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_hinge_matches_the_formula(beta, ratio):
    w, y = responses(*(a for a, _ in AVERAGES)), responses(*(b for _, b in AVERAGES))
    losses = SIMPO.loss(w, y, beta=beta, gamma_beta_ratio=ratio, link="hinge")
    margins = [beta * (a - b - ratio) for a, b in AVERAGES]
    assert losses.tolist() == pytest.approx([max(0.0, 1 - m) for m in margins], rel=1e-11)
    (gradient,) = torch.autograd.grad(losses.sum(), w.logp)
    expected = [-beta / n if m < 1 else 0.0 for m, n in zip(margins, w.length.tolist(), strict=True)]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-11)


def test_defaults_are_the_papers():
    w, y = responses(-0.3), responses(-0.9)
    assert SIMPO.loss(w, y).item() == pytest.approx(softplus(-2.0 * (0.6 - 0.5)), rel=1e-11)
    assert SIMPO.reward(w).item() == pytest.approx(2.0 * -0.3, rel=1e-11)


def test_the_reward_accepts_all_loss_hyperparameters():
    y = responses(-0.3, -4.0)
    reward = SIMPO.reward(y, beta=3.0, gamma_beta_ratio=0.7, link="hinge", label_smoothing=0.0)
    assert reward.tolist() == pytest.approx([-0.9, -12.0], rel=1e-11)


def test_the_sft_term_is_added():
    w = responses(-0.5, -3.0)
    losses = sft_term(w)
    assert losses.tolist() == pytest.approx([0.5, 3.0], rel=1e-11)
    (gradient,) = torch.autograd.grad(losses.sum(), w.logp)
    assert gradient.tolist() == pytest.approx([-1 / 3, -1 / 7], rel=1e-11)
