"""KTO's reference point and single responses."""

from __future__ import annotations

import pytest
import torch

from simpo.objectives import OBJECTIVES, Responses, reference_point

KTO = OBJECTIVES["kto"].with_hyperparameters(beta=0.2, lam_w=1.33, lam_l=0.5)


def responses(*ratios: float) -> Responses:
    ratio = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    return Responses(ratio, torch.full_like(ratio, 4.0), torch.zeros_like(ratio))


@pytest.mark.parametrize(("mean", "expected"), [(3.0, 0.6), (0.0, 0.0), (-3.0, 0.0)])
def test_reference_point_is_the_clamped_mean(mean, expected):
    ratio = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
    point = reference_point(ratio, beta=0.2)
    assert point.shape == ()
    assert point.item() == pytest.approx(expected, rel=1e-15)
    assert not point.requires_grad


def test_a_pair_equals_its_two_responses():
    w, y, z_ref = responses(2.0, -1.0, 0.3), responses(-2.0, 1.5, 0.3), torch.tensor(0.25, dtype=torch.float64)
    every = torch.tensor([True] * 3)
    apart = [KTO.unpaired(s, label, z_ref=z_ref) for s, label in ((w, every), (y, ~every))]
    torch.testing.assert_close(KTO.loss(w, y, z_ref=z_ref), apart[0] + apart[1], rtol=1e-14, atol=0)
    mixed = responses(2.0, 1.5, 0.3)
    label = torch.tensor([True, False, True])
    expected = torch.where(label, KTO.unpaired(mixed, every), KTO.unpaired(mixed, ~every))
    assert torch.equal(KTO.unpaired(mixed, label), expected)


def test_labels_have_opposite_gradients():
    y = responses(-0.4, -0.4)
    losses = KTO.unpaired(y, torch.tensor([True, False]), z_ref=torch.tensor(0.1, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(losses.sum(), y.logp)
    slope = torch.sigmoid(torch.tensor(-0.18, dtype=torch.float64))
    slope = 0.2 * slope * (1 - slope)  # the same for both, because the sigmoid is symmetric
    assert gradient.tolist() == pytest.approx([-1.33 * slope.item(), 0.5 * slope.item()], rel=1e-12)


def test_the_reference_point_has_no_gradient():
    ratio = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    w, y = responses(1.0), responses(-1.0)
    KTO.loss(w, y, z_ref=reference_point(ratio, 0.1)).sum().backward()
    assert ratio.grad is None
