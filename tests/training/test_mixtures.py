"""BCO's running shift and mixtures of objectives, step by step against the definition."""

# ruff: noqa: E741 - the papers' w and l

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.training.test_objectives import assert_alike, select, train, train_naively
from torch.nn import functional as F

from simpo import OBJECTIVES, Responses, SimpoError
from simpo.config import parse_settings
from simpo.objectives import Mixture
from simpo.training.configs import PreferenceConfig
from simpo.training.metrics import RunningMeans

RATE, BETA = 0.5, 0.7
SETTINGS = {
    "objective": "bco", "beta": BETA, "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 3,
    "train_sampling_strategy": "sequential",
}  # fmt: skip


def halves(y: Responses) -> tuple[Responses, Responses]:
    return select(y, slice(0, None, 2)), select(y, slice(1, None, 2))


def with_running_shift(rows, model, naive_responses, weights=None):
    """Train four steps of two rows by the definition; the shift averages the rewards of all earlier steps."""
    policy, chosen, rejected, seen, shifts = copy.deepcopy(model), 0.0, 0.0, 0.0, []
    optimizer = torch.optim.SGD(policy.parameters(), lr=RATE)
    for step in range(4):
        part = rows.select(range(2 * step, 2 * step + 2))
        prompts, responses = part["prompt_ids"][:], part["response_ids"][:]
        with torch.no_grad():
            ref_logp = naive_responses(model, prompts, responses).logp
        w, l = halves(replace(naive_responses(policy, prompts, responses), ref_logp=ref_logp))
        shifts.append((chosen + rejected) / (2 * seen) if seen else 0.0)
        losses = F.softplus(shifts[-1] - BETA * w.ratio) + F.softplus(BETA * l.ratio - shifts[-1])
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        chosen, rejected = (s + BETA * y.ratio.sum().item() for s, y in ((chosen, w), (rejected, l)))
        seen += 2
    return policy, shifts


def assert_same(model, expected, tolerance):
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("budget", [20, 1000])
def test_the_shift_is_the_mean_over_all_earlier_steps(budget, make_trainer, make_model, pairs, naive_responses):
    rows, model = pairs(8), make_model("gpt2", n_layer=3)
    expected, shifts = with_running_shift(rows, model, naive_responses)
    assert min(map(abs, shifts[2:])) > 1e-3  # in the first step, policy and reference are equal
    policy = copy.deepcopy(model)
    optimizers = torch.optim.SGD(policy.parameters(), lr=RATE), None
    make_trainer(rows, model=policy, optimizers=optimizers, max_batch_tokens=budget, **SETTINGS).train()
    assert_same(policy, expected, 1e-9)


def test_a_resumed_run_has_the_same_shift_as_an_uninterrupted_run(make_trainer, make_model, pairs, tmp_path):
    rows, model = pairs(8), make_model("gpt2")
    policies = []
    for folder, checkpoint in (("a", None), ("b", tmp_path / "a" / "checkpoint-3")):
        settings = {"output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 3} | SETTINGS
        policies.append(copy.deepcopy(model))
        optimizers = torch.optim.SGD(policies[-1].parameters(), lr=RATE), None
        trainer = make_trainer(rows, model=policies[-1], optimizers=optimizers, **settings)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    assert_same(policies[1], policies[0], 0)


def test_two_ranks_share_one_shift():
    values, weights = torch.arange(12, dtype=torch.float64).reshape(6, 2), torch.tensor([1, 2, 1, 0.5, 1, 3]).double()
    whole, *ranks = (RunningMeans(("loss", "reward"), torch.device("cpu")) for _ in range(3))
    assert whole.running("reward", lambda sums: sums).item() == 0
    whole.add(values, weights)
    for rank, part in zip(ranks, (slice(0, 2), slice(2, 6)), strict=True):
        rank.add(values[part], weights[part])
    others = [rank._since_log.clone() for rank in reversed(ranks)]
    found = [rank.running("reward", lambda own, o=other: own + o) for rank, other in zip(ranks, others, strict=True)]
    assert found[0] == found[1]
    assert found[0].item() == pytest.approx((weights @ values[:, 1] / weights.sum()).item(), rel=1e-15)


def test_single_responses_follow_the_formula(make_trainer, make_model, pairs, naive_responses):
    rows, model = pairs(6, responses=1).add_column("label", [True, False, False, True, True, True]), make_model("gpt2")
    label = torch.tensor(rows["label"][:])

    def loss(y: Responses, _):
        return F.softplus(torch.where(label, -0.1 * y.ratio, 0.1 * y.ratio)).mean()

    expected = train_naively(rows, model, naive_responses, loss)  # two steps; the shift is 0 in both
    assert_alike(train(make_trainer, rows, model, objective="bco", max_batch_tokens=45), expected)


# ---- mixtures ----


@pytest.mark.parametrize("budget", [45, 1000])
def test_a_mixture_is_the_weighted_sum_of_its_parts(budget, make_trainer, make_model, pairs, naive_responses):
    """With an anchor, a shared hyperparameter, and a hyperparameter that only one part has."""
    rows, model = pairs(5), make_model("gpt2")

    def loss(y: Responses, _):
        w, l = halves(y)
        dpo, bco = -F.logsigmoid(0.3 * (w.ratio - l.ratio)), F.softplus(-0.3 * w.ratio) + F.softplus(0.3 * l.ratio)
        orpo = -w.avg - 0.5 * F.logsigmoid(w.log_odds - l.log_odds)
        return (0.8 * dpo + 0.2 * bco + 2 * orpo).mean()

    settings = {"objective": {"dpo": 0.8, "bco": 0.2, "orpo": 2}, "beta": 0.3, "lam": 0.5, "max_batch_tokens": budget}
    assert_alike(train(make_trainer, rows, model, **settings), train_naively(rows, model, naive_responses, loss))


def test_ktos_reference_point_matches_the_definition_in_a_mixture(make_trainer, make_model, pairs, naive_responses):
    rows, model = pairs(4), make_model("gpt2")

    def loss(y: Responses, mismatched: Responses):
        w, l = halves(y)
        z_ref = 0.1 * mismatched.ratio.mean().clamp(min=0)
        return (OBJECTIVES["kto"].loss(w, l, z_ref=z_ref) / 2 + OBJECTIVES["simpo"].loss(w, l)).mean()

    expected = train_naively(rows, model, naive_responses, loss)
    assert_alike(train(make_trainer, rows, model, objective={"simpo": 1, "kto": 0.5}), expected)


def test_hyperparameters_apply_to_their_parts():
    mixture = Mixture.of({"simpo": 1.0, "dpo": 0.5})
    assert mixture.name == "1 simpo + 0.5 dpo"
    values = mixture.resolve({"label_smoothing": 0.1, "gamma": 1.0})
    assert values["simpo.gamma_beta_ratio"] == 0.5
    assert (values["simpo.beta"], values["dpo.beta"]) == (2.0, 0.1)
    assert values["simpo.label_smoothing"] == values["dpo.label_smoothing"] == 0.1
    assert mixture.with_hyperparameters(**values).parts[1] == OBJECTIVES["dpo"].with_hyperparameters(
        label_smoothing=0.1
    )
    assert Mixture.of({"dpo": 1, "bco": 1}).leading.name == "bco"
    assert not Mixture.of({"dpo": 1, "bco": 1}).takes_unpaired
    assert Mixture.of({"kto": 1, "bco": 1}).takes_unpaired
    assert Mixture.of({"simpo": 1}).anchor(Responses(*torch.ones(2, 3))) is None


def test_mixtures_can_be_given_in_a_recipe_or_on_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: {dpo: 0.8, bco: 0.2}\nuse_cpu: true\nreport_to: none\n")
    (config,) = parse_settings([str(path)], (PreferenceConfig,))
    assert config.objective == {"dpo": 0.8, "bco": 0.2}
    (config,) = parse_settings([str(path), "--objective", '{"simpo": 1}'], (PreferenceConfig,))
    assert config.objective == {"simpo": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": {"dpo": 0.0, "bco": 0.0}}, "objective: the weight of dpo must be above 0 and finite, not 0"),
        ({"objective": {"dpo": 1.0, "bco": -1.0}}, "objective: the weight of bco"),
        ({"objective": {"dpo": float("nan")}}, "objective: the weight of dpo"),
        ({"objective": {}}, "objective: the mixture is empty"),
        ({"objective": {"dpp": 1.0}}, "objective: 'dpp' is unknown; choose from simpo"),
        ({"objective": {"dpo": 1.0, "bco": 1.0}, "tau": 1.0}, "tau is not a hyperparameter of dpo or bco"),
        ({"objective": {"dpo": 1.0, "simpo": 1.0}, "beta": 0.0}, "beta must be > 0"),
        ({"objective": {"dpo": 1.0}, "loss_type": "hinge"}, "loss_type: cannot be combined with a mixture"),
        ({"objective": {"dpo": 1.0, "orpo": 1.0}, "sft_weight": 0.1}, "sft_weight: objective '1 dpo . 1 orpo'"),
    ],
)
def test_bad_mixtures_are_reported_by_name(settings, message, config):
    with pytest.raises(SimpoError, match=message):
        config(**settings)
