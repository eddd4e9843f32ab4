"""Quantities derived from a response, in 60-digit arithmetic where floats need care."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch

from simpo.objectives import OBJECTIVES, Responses

AVERAGES = [-1e-7, -1e-3, -0.1, -0.69, -0.6931471805599453, -0.7, -1.0, -5.0, -50.0]


def exact_log_odds(avg: float) -> tuple[float, float]:
    """Return ``log(p / (1 - p))`` and its derivative ``1 / (1 - p)`` for ``p = exp(avg)``."""
    getcontext().prec = 60
    p = Decimal(avg).exp()
    return float(Decimal(avg) - (1 - p).ln()), float(1 / (1 - p))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
@pytest.mark.parametrize("avg", AVERAGES)
def test_log_odds_are_accurate(avg, dtype, tolerance):
    logp = torch.tensor([avg, -0.5], dtype=dtype, requires_grad=True)
    y = Responses(logp, torch.ones(2, dtype=dtype))
    value, slope = exact_log_odds(logp[0].item())
    assert y.log_odds[0].item() == pytest.approx(value, rel=tolerance, abs=tolerance)
    (gradient,) = torch.autograd.grad(y.log_odds.sum(), logp)
    assert gradient[0].item() == pytest.approx(slope, rel=tolerance)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_of_extremes_is_finite(dtype):
    """The branch taken by one row must not affect another's gradient."""
    logp = torch.tensor(AVERAGES, dtype=dtype, requires_grad=True)
    y = Responses(logp, torch.ones(len(AVERAGES), dtype=dtype))
    for values in (y.avg, y.log_odds):
        (gradient,) = torch.autograd.grad(values.sum(), logp, retain_graph=True)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_odds_of_a_certain_response_are_finite(dtype):
    """If a probability rounds to 1, its log-odds are large but finite, and other rows are unaffected."""
    logp = torch.tensor([0.0, -1e-11, -0.5], dtype=dtype, requires_grad=True)
    odds = Responses(logp, torch.ones(3, dtype=dtype)).log_odds
    assert odds[0].item() == pytest.approx(12 * math.log(10), rel=1e-6)
    assert odds[0] > odds[1]
    assert odds[2].item() == pytest.approx(exact_log_odds(-0.5)[0], rel=1e-6)
    (gradient,) = torch.autograd.grad(odds.sum(), logp)
    assert gradient.tolist() == pytest.approx([1e12, 1e11, exact_log_odds(-0.5)[1]], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orpo_gradients_of_certain_responses_are_finite(dtype):
    """For a certain chosen response, the gradient is the limit: ``lam`` times the odds of the rejected one."""
    row, length = OBJECTIVES["orpo"], torch.ones(2, dtype=dtype)
    certain, other = (torch.tensor([avg, 0.0], dtype=dtype, requires_grad=True) for avg in (0.0, -2.0))
    for w, l in ((certain, other), (other, certain)):  # noqa: E741
        losses = row.with_hyperparameters(lam=0.5).pair(Responses(w, length), Responses(l, length))
        gradients = torch.autograd.grad(losses.sum(), (w, l))
        assert losses.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[0] < 0).all() and (gradients[1] > 0).all()
        if w is certain:
            assert gradients[0][0].item() == pytest.approx(-0.5 * math.exp(exact_log_odds(-2.0)[0]), rel=1e-4)


def test_avg_and_ratio_match_their_definitions():
    logp = torch.tensor([-6.0, -1.0], dtype=torch.float64, requires_grad=True)
    y = Responses(logp, torch.tensor([4.0, 3.0], dtype=torch.float64), torch.tensor([-5.0, -3.0], dtype=torch.float64))
    assert y.avg.tolist() == pytest.approx([-1.5, -1 / 3], rel=1e-15)
    assert y.ratio.tolist() == [-1.0, 2.0]
    assert y.avg_ratio.tolist() == pytest.approx([-1 / 4, 2 / 3], rel=1e-15)
    assert torch.autograd.grad(y.avg.sum(), logp)[0].tolist() == pytest.approx([1 / 4, 1 / 3])
    assert torch.autograd.grad(y.ratio.sum(), logp)[0].tolist() == [1.0, 1.0]


def test_lengths_may_be_integers():
    assert Responses(torch.tensor([-6.0]), torch.tensor([4])).avg.item() == -1.5


def test_a_ratio_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match="ref_logp is missing"):
        Responses(torch.zeros(1), torch.ones(1)).ratio  # noqa: B018
    with pytest.raises(ValueError, match="ref_logp is missing"):
        Responses(torch.zeros(1), torch.ones(1)).avg_ratio  # noqa: B018
