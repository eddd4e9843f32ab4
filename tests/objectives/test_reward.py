"""Reward model losses against their closed forms in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from simpo.objectives.preference import bradley_terry, centering

PAIRS = [(0.3, -1.2, 0.0), (-2.0, 1.5, 0.5), (4.0, 4.0, 1.0), (0.0, 0.0, 0.0)]


def test_losses_match_the_closed_forms():
    w, l, margin = torch.tensor(PAIRS, dtype=torch.float64).unbind(1)  # noqa: E741
    expected = [math.log1p(math.exp(-(a - b - m))) for a, b, m in PAIRS]
    torch.testing.assert_close(bradley_terry(w, l, margin).tolist(), expected, rtol=1e-12, atol=0)
    assert bradley_terry(w, l)[3].item() == pytest.approx(math.log(2), abs=1e-15)
    assert centering(w, l).tolist() == pytest.approx([(a + b) ** 2 for a, b, _ in PAIRS], abs=1e-15)


def test_gradients_match_the_closed_forms():
    """Bradley-Terry: minus the probability that the label is wrong; centering: twice the sum."""
    w, l, margin = torch.tensor(PAIRS, dtype=torch.float64).unbind(1)  # noqa: E741
    w, l = w.requires_grad_(), l.requires_grad_()  # noqa: E741
    (d_w, d_l) = torch.autograd.grad(bradley_terry(w, l, margin).sum(), (w, l))
    wrong = [1 / (1 + math.exp(a - b - m)) for a, b, m in PAIRS]
    assert d_w.tolist() == pytest.approx([-p for p in wrong], abs=1e-14)
    assert d_l.tolist() == pytest.approx(wrong, abs=1e-14)
    assert torch.autograd.grad(centering(w, l).sum(), w)[0].tolist() == pytest.approx(
        [2 * (a + b) for a, b, _ in PAIRS], abs=1e-14
    )


def test_only_differences_matter_and_centering_fixes_the_offset():
    w, l = torch.tensor([1.0]), torch.tensor([0.5])  # noqa: E741
    torch.testing.assert_close(bradley_terry(w + 7, l + 7), bradley_terry(w, l))
    assert centering(w + 7, l + 7) > centering(w, l) > centering(w - 0.75, l - 0.75) == 0


def test_extreme_rewards_give_finite_losses():
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = bradley_terry(far, torch.zeros(2))
    assert losses.tolist() == [1e4, 0]
    assert torch.autograd.grad(losses.sum(), far)[0].tolist() == [-1, 0]
