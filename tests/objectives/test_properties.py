"""Properties of every objective, whatever its formula: direction, finite extremes, the first step of a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from simpo.objectives import OBJECTIVES, Responses

POINTS = 2000
# besides the defaults; with anchors of weight 0, satisfied hinges are flat
SETTINGS = {
    "simpo": [{"beta": 10.0, "gamma_beta_ratio": 0.3}],
    "dpo": [{"beta": 0.01}],
    "ipo": [{"tau": 0.01}, {"length_normalized": True}],
    "cpo": [{"beta": 0.01, "lam": 0.5}],
    "kto": [{"lam_w": 1.33, "beta": 0.05}],
    "orpo": [{"lam": 2.0}],
    "r_dpo": [{"alpha": 0.5, "beta": 0.01}],
    "slic_hf": [{"delta": 0.1, "lam": 0.1}],
    "rrhf": [{"lam": 0.1}],
    "dpo_norm": [{"beta": 2.0}],
    "alphapo": [{"alpha": -0.5}, {"alpha": 0.0}],
    "dpop": [{"lam": 5.0}],
    "repo": [{"gamma": 1.0}],
    "chi_po": [{"beta": 0.005, "r_max": 10.0}],
    "f_dpo": [{"divergence": "forward_kl", "beta": 0.01}, {"divergence": "alpha"}],
    "apo_zero": [{"beta": 0.5}],
    "nca": [{"beta": 0.2}],
    "sppo": [{"beta": 0.01}],
    "listwise": [{"beta": 10.0}],
    "listwise_nca": [{"beta": 0.2}],
    "info_nca": [{"beta": 0.2}],
}
CASES = [(name, settings) for name in OBJECTIVES for settings in ({}, *SETTINGS.get(name, []))]


@pytest.fixture(scope="module")
def pairs() -> tuple[Responses, Responses]:
    """Random responses of 1 to 200 tokens, each close to its reference."""
    generator = torch.Generator().manual_seed(0)

    def side() -> Responses:
        length = torch.randint(1, 200, (POINTS,), generator=generator).double()
        avg = -(0.02 + 3 * torch.rand(POINTS, generator=generator, dtype=torch.float64))
        ratio = torch.randn(POINTS, generator=generator, dtype=torch.float64) * length.sqrt() / 4
        return Responses(avg * length, length, avg * length - ratio)

    return side(), side()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_loss_falls_with_chosen_and_never_with_rejected(name, settings, pairs):
    w, y = pairs
    row = OBJECTIVES[name]
    step = 0.01 * w.length, 0.01 * y.length  # 0.01 nats per token; averages stay below 0

    def loss(a: Responses, b: Responses) -> torch.Tensor:
        return row.loss(a, b, **settings)

    before = loss(w, y)
    chosen_up = loss(replace(w, logp=w.logp + step[0]), y)
    rejected_up = loss(w, replace(y, logp=y.logp + step[1]))
    counted = torch.ones(POINTS, dtype=torch.bool)
    if name == "ipo":  # it pulls margins beyond the target back
        scale = (w.length, y.length) if settings.get("length_normalized") else (1.0, 1.0)
        counted = (w.ratio + step[0]) / scale[0] - y.ratio / scale[1] < 1 / (2 * settings.get("tau", 0.1))
        assert counted.sum() > POINTS / 2
    if name == "repo":  # a pair won by more than gamma has no gradient
        counted = w.avg - y.avg < settings.get("gamma", 0.4)
    if name == "chi_po":  # nor does one with a clipped margin
        margin = row.reward(w, **settings) - row.reward(y, **settings)
        counted = margin.abs() < 2 * settings.get("r_max", 2.0)
    if name in ("nca", "listwise_nca"):  # a chosen response with a reward above ln 2 is pulled back
        counted = row.reward(replace(w, logp=w.logp + step[0]), **settings) < math.log(2)
    if name == "sppo":  # responses are pulled to their targets from both sides
        target = 0.5 / settings.get("beta", 0.001)
        counted = (w.ratio + step[0] < target) & (y.ratio > -target)
    if name == "apo_down":  # it lowers chosen responses too, but rejected ones more
        assert (rejected_up > before).all()
        both_up = loss(replace(w, logp=w.logp + 0.01), replace(y, logp=y.logp + 0.01))
        assert (both_up > before).all()
        return
    assert counted.sum() > POINTS / 4
    assert (chosen_up < before)[counted].all()
    assert (rejected_up >= before)[counted].all()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_reward_rises_with_the_log_probability(name, settings, pairs):
    y = pairs[0]
    reward = OBJECTIVES[name].reward
    assert (reward(replace(y, logp=y.logp + 0.01 * y.length), **settings) > reward(y, **settings)).all()


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "dpop"])
def test_the_loss_is_ln_2_when_policy_equals_reference(name, pairs):
    """Whatever beta; this is the sanity check of a run's first step."""
    w, y = (replace(side, ref_logp=side.logp.clone()) for side in pairs)
    for beta in (0.01, 0.1, 5.0):
        losses = OBJECTIVES[name].loss(w, y, beta=beta)
        torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_give_finite_results(name, dtype):
    """Average log-probabilities of -1e-7 and -50, either way round."""
    length = torch.tensor([3.0, 5.0], dtype=dtype)
    logps = [torch.tensor(avgs, dtype=dtype) * length for avgs in ([-1e-7, -50.0], [-50.0, -1e-7])]
    logps = [logp.requires_grad_() for logp in logps]
    reference = torch.tensor([-1.0, -1.0], dtype=dtype)
    row = OBJECTIVES[name]
    w, y = (Responses(logp, length, reference) for logp in logps)
    values = torch.stack([row.loss(w, y), row.reward(w), row.reward(y)])
    assert values.isfinite().all()
    for gradient in torch.autograd.grad(values.sum(), logps):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_single_precision_is_accurate(name, pairs):
    w, y = pairs
    single = [Responses(s.logp.float(), s.length.float(), s.ref_logp.float()) for s in (w, y)]
    torch.testing.assert_close(
        OBJECTIVES[name].loss(*single), OBJECTIVES[name].loss(w, y).float(), rtol=1e-4, atol=1e-4
    )
