"""Every objective against its closed form in plain Python: losses, rewards, and gradients by finite differences."""

# ruff: noqa: E741 - the papers' w and l

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from simpo.objectives import OBJECTIVES, Responses


@dataclass(frozen=True)
class Point:
    """A response: its log-probability, the reference's log-probability, and its length."""

    logp: float
    ref: float
    n: int

    @property
    def avg(self) -> float:
        return self.logp / self.n

    @property
    def ratio(self) -> float:
        return self.logp - self.ref

    @property
    def odds(self) -> float:
        """log(p / (1 - p)) with p = exp(avg)."""
        return self.avg - (math.log(-math.expm1(self.avg)) if self.avg > -0.7 else math.log1p(-math.exp(self.avg)))


# chosen and rejected: equal, typical, decided either way, far apart, nearly certain, chosen below and above reference
PAIRS = [
    (Point(-3.5, -3.5, 7), Point(-3.5, -3.5, 7)),
    (Point(-41.25, -43.0, 33), Point(-38.5, -37.25, 20)),
    (Point(-12.0, -9.0, 5), Point(-2.25, -2.5, 9)),
    (Point(-1.0, -30.0, 250), Point(-400.0, -360.0, 250)),
    (Point(-400.0, -380.0, 250), Point(-1.0, -8.0, 250)),
    (Point(-7e-7, -1e-3, 7), Point(-150.0, -151.0, 3)),
    (Point(-150.0, -149.5, 3), Point(-7e-7, -1e-6, 7)),
    (Point(-0.5, -0.75, 1), Point(-0.625, -0.5, 2)),
]
Z_REF, SHIFT = 0.375, -0.25


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def nll(margin: float, smoothing: float) -> float:
    return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)


def simpo(w, l, beta=2.0, gamma_beta_ratio=0.5, link="sigmoid", label_smoothing=0.0):
    margin = beta * w.avg - beta * l.avg - beta * gamma_beta_ratio
    return max(0.0, 1 - margin) if link == "hinge" else nll(margin, label_smoothing)


def dpo(w, l, beta=0.1, label_smoothing=0.0):
    return nll(beta * w.ratio - beta * l.ratio, label_smoothing)


def ipo(w, l, tau=0.1, length_normalized=False):
    gap = w.ratio / w.n - l.ratio / l.n if length_normalized else w.ratio - l.ratio
    return (gap - 1 / (2 * tau)) ** 2


def cpo(w, l, beta=0.1, label_smoothing=0.0, lam=1.0):
    return nll(beta * w.logp - beta * l.logp, label_smoothing) - lam * w.logp


def kto(w, l, beta=0.1, lam_w=1.0, lam_l=1.0):
    desirable, undesirable = beta * w.ratio - Z_REF, Z_REF - beta * l.ratio
    return lam_w * sigmoid(-desirable) + lam_l * sigmoid(-undesirable)


def orpo(w, l, lam=0.1):
    return -w.avg + lam * softplus(l.odds - w.odds)


def r_dpo(w, l, beta=0.1, alpha=0.05, label_smoothing=0.0):
    return nll(beta * w.ratio - beta * l.ratio + (alpha * w.n - alpha * l.n), label_smoothing)


def slic_hf(w, l, delta=1.0, lam=1.0):
    return max(0.0, delta - w.logp + l.logp) - lam * w.logp


def rrhf(w, l, lam=1.0):
    return max(0.0, l.avg - w.avg) - lam * w.logp


def dpo_norm(w, l, beta=5.0, label_smoothing=0.0):
    return nll(beta * w.ratio / w.n - beta * l.ratio / l.n, label_smoothing)


def shaped(y, alpha, beta):
    return beta * (y.avg if alpha == 0 else -math.expm1(-alpha * y.avg) / alpha)


def alphapo(w, l, alpha=0.25, beta=2.5, gamma_beta_ratio=0.1, label_smoothing=0.0):
    return nll(shaped(w, alpha, beta) - shaped(l, alpha, beta) - beta * gamma_beta_ratio, label_smoothing)


def simper(w, l):
    return math.exp(l.avg) - math.exp(w.avg)


def dpop(w, l, beta=0.3, lam=50.0, label_smoothing=0.0):
    return nll(beta * (w.ratio - l.ratio - lam * max(0.0, -w.ratio)), label_smoothing)


def repo(w, l, gamma=0.4):
    return max(0.0, gamma - w.avg + l.avg)


def chi_reward(y, beta=0.05, **_):
    return math.exp(min(math.log(beta) + y.ratio, 20)) + beta * y.ratio


def chi_po(w, l, beta=0.05, r_max=2.0, label_smoothing=0.0):
    margin = chi_reward(w, beta) - chi_reward(l, beta)
    return nll(min(max(margin, -2 * r_max), 2 * r_max), label_smoothing)


def f_reward(y, divergence="js", alpha=0.5, beta=0.1, **_):
    if divergence == "js":  # log(2u / (1 + u))
        return beta * (math.log(2) - softplus(-y.ratio))
    order = 1.0 if divergence == "forward_kl" else alpha
    return -beta * math.expm1(min(-order * y.ratio, 20)) / order


def f_dpo(w, l, label_smoothing=0.0, **settings):
    return nll(f_reward(w, **settings) - f_reward(l, **settings), label_smoothing)


def bco(w, l, beta=0.1):
    return softplus(SHIFT - beta * w.ratio) + softplus(beta * l.ratio - SHIFT)


def apo_zero(w, l, beta=0.1):
    return sigmoid(-beta * w.ratio) + sigmoid(beta * l.ratio)


def apo_down(w, l, beta=0.1):
    return sigmoid(beta * w.ratio) + sigmoid(beta * l.ratio - beta * w.ratio)


def nca(w, l, beta=0.01):
    return softplus(-beta * w.ratio) + 0.5 * softplus(beta * w.ratio) + 0.5 * softplus(beta * l.ratio)


def sppo(w, l, beta=0.001, label_smoothing=0.0):
    wins = 1 - label_smoothing
    return (w.ratio - (wins - 0.5) / beta) ** 2 + (l.ratio - (1 - wins - 0.5) / beta) ** 2


@dataclass(frozen=True)
class Golden:
    """An objective's loss and reward, and settings to try besides its defaults, which are written out above."""

    loss: Callable[..., float]
    reward: Callable[..., float]
    settings: tuple[dict, ...] = ()


GOLDENS = {
    "simpo": Golden(
        simpo,
        lambda y, beta=2.0, **_: beta * y.avg,
        ({"beta": 10.0, "gamma_beta_ratio": 0.3}, {"link": "hinge"}, {"label_smoothing": 0.2}),
    ),
    "dpo": Golden(dpo, lambda y, beta=0.1, **_: beta * y.ratio, ({"beta": 0.01}, {"label_smoothing": 0.3})),
    "ipo": Golden(
        ipo,
        lambda y, tau=0.1, length_normalized=False: tau * y.ratio / (y.n if length_normalized else 1),
        ({"tau": 0.5}, {"length_normalized": True}, {"tau": 1.0, "length_normalized": True}),
    ),
    "cpo": Golden(
        cpo,
        lambda y, beta=0.1, **_: beta * y.logp,
        ({"beta": 0.01, "lam": 0.5}, {"lam": 0.0}, {"label_smoothing": 0.1}),
    ),
    "kto": Golden(
        kto, lambda y, beta=0.1, **_: beta * y.ratio, ({"beta": 0.05}, {"lam_w": 1.33}, {"lam_w": 0.0, "lam_l": 2.0})
    ),
    "orpo": Golden(orpo, lambda y, **_: y.odds, ({"lam": 2.0}, {"lam": 0.0})),
    "r_dpo": Golden(
        r_dpo,
        lambda y, beta=0.1, **_: beta * y.ratio,
        ({"beta": 0.01, "alpha": 0.5}, {"alpha": 0.0}, {"label_smoothing": 0.1}),
    ),
    "slic_hf": Golden(slic_hf, lambda y, **_: y.logp, ({"delta": 0.1, "lam": 0.5}, {"delta": 2.0, "lam": 0.0})),
    "rrhf": Golden(rrhf, lambda y, **_: y.avg, ({"lam": 10.0}, {"lam": 0.0})),
    "dpo_norm": Golden(
        dpo_norm, lambda y, beta=5.0, **_: beta * y.ratio / y.n, ({"beta": 2.0}, {"label_smoothing": 0.4})
    ),
    "alphapo": Golden(
        alphapo,
        lambda y, alpha=0.25, beta=2.5, **_: shaped(y, alpha, beta),
        ({"alpha": 0.0}, {"alpha": -0.5, "beta": 10.0, "gamma_beta_ratio": 0.4}, {"alpha": 1e-9}, {"alpha": 2.0}),
    ),
    "simper": Golden(simper, lambda y: math.exp(y.avg)),
    "dpop": Golden(
        dpop, lambda y, beta=0.3, **_: beta * y.ratio, ({"beta": 0.1, "lam": 5.0}, {"lam": 0.0, "label_smoothing": 0.1})
    ),
    "repo": Golden(repo, lambda y, **_: y.avg, ({"gamma": 1.0}, {"gamma": 0.0})),
    "chi_po": Golden(chi_po, chi_reward, ({"beta": 0.005}, {"r_max": 50.0, "label_smoothing": 0.2})),
    "apo_zero": Golden(apo_zero, lambda y, beta=0.1: beta * y.ratio, ({"beta": 0.5},)),
    "apo_down": Golden(apo_down, lambda y, beta=0.1: beta * y.ratio, ({"beta": 0.5},)),
    "nca": Golden(nca, lambda y, beta=0.01: beta * y.ratio, ({"beta": 0.2},)),
    "sppo": Golden(sppo, lambda y, beta=0.001, **_: beta * y.ratio, ({"beta": 0.1}, {"label_smoothing": 0.3})),
    "f_dpo": Golden(
        f_dpo,
        f_reward,
        ({"divergence": "forward_kl"}, {"divergence": "alpha"}, {"divergence": "alpha", "alpha": 0.1}, {"beta": 1.0}),
    ),
    "bco": Golden(bco, lambda y, beta=0.1: beta * y.ratio, ({"beta": 0.5},)),
    "listwise": Golden(
        lambda w, l, beta=2.0: nll(beta * w.avg - beta * l.avg, 0.0),
        lambda y, beta=2.0: beta * y.avg,
        ({"beta": 10.0},),
    ),
    "listwise_dpo": Golden(
        lambda w, l, beta=0.1: nll(beta * w.ratio - beta * l.ratio, 0.0),
        lambda y, beta=0.1: beta * y.ratio,
        ({"beta": 0.01},),
    ),
    "listwise_nca": Golden(
        lambda w, l, beta=0.01, **_: nca(w, l, beta), lambda y, beta=0.01, **_: beta * y.ratio, ({"beta": 0.2},)
    ),
    "info_nca": Golden(
        lambda w, l, beta=0.01, **_: nll(beta * w.ratio - beta * l.ratio, 0.0),
        lambda y, beta=0.01, **_: beta * y.ratio,
        ({"beta": 0.2},),
    ),
}
CASES = [(name, settings) for name, golden in GOLDENS.items() for settings in ({}, *golden.settings)]


def side(points) -> Responses:
    columns = zip(*((point.logp, point.n, point.ref) for point in points), strict=True)
    logp, length, ref = (torch.tensor(column, dtype=torch.float64) for column in columns)
    return Responses(logp.requires_grad_(), length, ref)


def context(name: str) -> dict:
    values = {"z_ref": Z_REF, "reward_shift": SHIFT}
    needed = [name for name in OBJECTIVES[name].needs if name in values]
    return {name: torch.tensor(values[name], dtype=torch.float64) for name in needed}


def test_every_objective_has_a_closed_form():
    assert GOLDENS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_losses_match_the_closed_forms(name, settings):
    row = OBJECTIVES[name]
    w, y = (side(points) for points in zip(*PAIRS, strict=True))
    expected = [GOLDENS[name].loss(*pair, **settings) for pair in PAIRS]
    for given in (settings, row.resolve(settings)):
        losses = row.loss(w, y, **given, **context(name))
        assert losses.shape == (len(PAIRS),)
        assert losses.tolist() == pytest.approx(expected, rel=1e-11, abs=0)
    for gradient in torch.autograd.grad(losses.sum(), (w.logp, y.logp)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_rewards_match_the_closed_forms(name, settings):
    for points in zip(*PAIRS, strict=True):
        rewards = OBJECTIVES[name].reward(side(points), **settings, **context(name))
        expected = [GOLDENS[name].reward(point, **settings) for point in points]
        assert rewards.tolist() == pytest.approx(expected, rel=1e-11, abs=0)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_pair_term_plus_anchor_is_the_loss(name, settings):
    row = OBJECTIVES[name]
    w, y = (side(points) for points in zip(*PAIRS, strict=True))
    objective = row.with_hyperparameters(**settings)
    losses, anchor = objective.pair(w, y, **context(name)), objective.anchor(w)
    if anchor is not None:
        losses = losses + anchor
    assert torch.equal(losses, row.loss(w, y, **settings, **context(name)))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradients_match_finite_differences(name, settings):
    """At points away from the kinks of the hinges."""
    sides = [side(points) for points in zip(*(PAIRS[i] for i in (1, 2, 7)), strict=True)]

    def loss(a, b):
        w, y = (Responses(x, s.length, s.ref_logp) for x, s in zip((a, b), sides, strict=True))
        return OBJECTIVES[name].loss(w, y, **settings, **context(name))

    assert torch.autograd.gradcheck(loss, [s.logp for s in sides])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pairs_do_not_see_each_other(name):
    row = OBJECTIVES[name]
    w, y = (side(points) for points in zip(*PAIRS, strict=True))
    alone = [
        row.loss(*(Responses(s.logp[i : i + 1], s.length[i : i + 1], s.ref_logp[i : i + 1]) for s in (w, y)))
        for i in range(len(PAIRS))
    ]
    assert torch.equal(torch.cat(alone), row.loss(w, y))
