"""Derived figures of a response, in 60-digit arithmetic where floats need care."""

from __future__ import annotations

from decimal import Decimal, getcontext

import pytest
import torch

from simpo.objectives import Responses

AVERAGES = [-1e-7, -1e-3, -0.1, -0.69, -0.6931471805599453, -0.7, -1.0, -5.0, -50.0]


def exact_log_odds(avg: float) -> tuple[float, float]:
    """``log(p / (1 - p))`` and its derivative ``1 / (1 - p)`` with ``p = exp(avg)``."""
    getcontext().prec = 60
    p = Decimal(avg).exp()
    return float(Decimal(avg) - (1 - p).ln()), float(1 / (1 - p))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
@pytest.mark.parametrize("avg", AVERAGES)
def test_log_odds(avg, dtype, tolerance):
    logp = torch.tensor([avg, -0.5], dtype=dtype, requires_grad=True)
    y = Responses(logp, torch.ones(2, dtype=dtype))
    value, slope = exact_log_odds(logp[0].item())
    assert y.log_odds[0].item() == pytest.approx(value, rel=tolerance, abs=tolerance)
    (gradient,) = torch.autograd.grad(y.log_odds.sum(), logp)
    assert gradient[0].item() == pytest.approx(slope, rel=tolerance)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_whole_batch_of_extremes_is_finite(dtype):
    """One row's branch must not reach another's gradient."""
    logp = torch.tensor(AVERAGES, dtype=dtype, requires_grad=True)
    y = Responses(logp, torch.ones(len(AVERAGES), dtype=dtype))
    for values in (y.avg, y.log_odds):
        (gradient,) = torch.autograd.grad(values.sum(), logp, retain_graph=True)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


def test_log_odds_of_a_certain_response_leaves_the_others_alone():
    """In fp32 a probability can round to 1, whose log-odds are infinite; the gradient must not be NaN."""
    logp = torch.tensor([0.0, -0.5], requires_grad=True)
    odds = Responses(logp, torch.ones(2)).log_odds
    (gradient,) = torch.autograd.grad(odds.sum(), logp)
    assert odds[1].item() == pytest.approx(exact_log_odds(-0.5)[0], rel=1e-6)
    assert not gradient.isnan().any()
    loss = -torch.nn.functional.logsigmoid(odds[0] - odds[1])
    assert loss.item() == 0.0


def test_avg_and_ratio():
    logp = torch.tensor([-6.0, -1.0], dtype=torch.float64, requires_grad=True)
    y = Responses(logp, torch.tensor([4.0, 3.0], dtype=torch.float64), torch.tensor([-5.0, -3.0], dtype=torch.float64))
    assert y.avg.tolist() == pytest.approx([-1.5, -1 / 3], rel=1e-15)
    assert y.ratio.tolist() == [-1.0, 2.0]
    assert y.avg_ratio.tolist() == pytest.approx([-1 / 4, 2 / 3], rel=1e-15)
    assert torch.autograd.grad(y.avg.sum(), logp)[0].tolist() == pytest.approx([1 / 4, 1 / 3])
    assert torch.autograd.grad(y.ratio.sum(), logp)[0].tolist() == [1.0, 1.0]


def test_integer_lengths():
    assert Responses(torch.tensor([-6.0]), torch.tensor([4])).avg.item() == -1.5


def test_a_ratio_without_reference_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="ref_logp is missing"):
        Responses(torch.zeros(1), torch.ones(1)).ratio  # noqa: B018
    with pytest.raises(ValueError, match="ref_logp is missing"):
        Responses(torch.zeros(1), torch.ones(1)).avg_ratio  # noqa: B018
