"""Hyperparameters: the fields of an objective, validated by name."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from simpo.objectives import OBJECTIVES, Responses

SIMPO = OBJECTIVES["simpo"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_fields_are_the_schema(name):
    """Every field is a hyperparameter with a help text, and every number has bounds that include its default."""
    row = OBJECTIVES[name]
    assert row.name == name
    assert list(row.hyperparameters) == [field.name for field in dataclasses.fields(row)]
    assert row.resolve({}) == dataclasses.asdict(row)
    for key, known in row.hyperparameters.items():
        assert known.name == key
        assert known.help.endswith(".")
        assert (known.bound is not None) == (known.type is float)
        known.check(known.default)
    for key, alias in row.aliases.items():
        assert key not in row.hyperparameters
        assert alias.of in row.hyperparameters


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_reward_accept_exactly_the_hyperparameters(name):
    row = OBJECTIVES[name]
    y = Responses(torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([-1.5]))
    for function, arguments in ((row.loss, (y, y)), (row.reward, (y,))):
        assert function(*arguments, **row.resolve({})).shape == (1,)
        with pytest.raises(ValueError, match=f"bta is not a hyperparameter of objective '{name}'"):
            function(*arguments, bta=1.0)


def test_an_objective_can_need_more_from_a_batch():
    """A margin per pair, for example, is an argument of the pair term rather than a hyperparameter."""

    class WithMargin(type(SIMPO)):
        name = "simpo_margin"
        needs = ("margin",)

        def pair(self, w, l, margin):  # noqa: E741
            return -torch.nn.functional.logsigmoid(self.beta * (w.avg - l.avg) - margin)

    row, margin = WithMargin(), torch.tensor([0.3])
    w, y = (Responses(torch.tensor([logp]), torch.tensor([2.0])) for logp in (-1.0, -3.0))
    assert row.loss(w, y, margin=margin, beta=1.5).item() == pytest.approx(math.log(1 + math.exp(-1.2)))
    assert row.reward(w, margin=margin, beta=1.5).item() == -0.75
    assert "margin" not in row.hyperparameters
    assert not row.needs_reference


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if row.needs_reference])
def test_a_missing_reference_is_reported(name):
    y = Responses(torch.tensor([-1.0]), torch.tensor([2.0]))
    for function, arguments in ((OBJECTIVES[name].loss, (y, y)), (OBJECTIVES[name].reward, (y,))):
        with pytest.raises(ValueError, match="ref_logp is missing"):
            function(*arguments)


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if not row.needs_reference])
def test_reference_free_objectives_ignore_the_reference(name):
    row = OBJECTIVES[name]
    plain = Responses(torch.tensor([-1.0]), torch.tensor([2.0]))
    referenced = Responses(plain.logp, plain.length, torch.tensor([-7.0]))
    assert torch.equal(row.loss(plain, plain), row.loss(referenced, referenced))


def test_simpos_defaults_are_fixed():
    assert SIMPO.resolve({}) == {"beta": 2.0, "gamma_beta_ratio": 0.5, "link": "sigmoid", "label_smoothing": 0.0}
    assert SIMPO.resolve({"beta": 10, "link": "hinge"}) == SIMPO.resolve({}) | {"beta": 10, "link": "hinge"}


@pytest.mark.parametrize(("gamma", "beta"), [(0.5, None), (1.4, 10.0), (0.0, 2.5), (3.0, 0.1)])
def test_gamma_is_the_absolute_margin(gamma, beta):
    resolved = SIMPO.resolve({"gamma": gamma} | ({} if beta is None else {"beta": beta}))
    assert resolved["gamma_beta_ratio"] * resolved["beta"] == pytest.approx(gamma, rel=1e-15)
    assert "gamma" not in resolved


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0}, r"beta must be > 0, not 0"),
        ({"beta": -1.0}, r"beta must be > 0"),
        ({"beta": "abc"}, r"beta: 'abc' is not a number"),
        ({"beta": True}, r"beta: True is not a number"),
        ({"beta": math.nan}, r"beta must be > 0, not nan"),
        ({"beta": math.inf}, r"beta .*inf"),
        ({"gamma_beta_ratio": -0.1}, r"gamma_beta_ratio must be >= 0"),
        ({"gamma_beta_ratio": math.nan}, r"gamma_beta_ratio must be >= 0, not nan"),
        ({"gamma": -0.1}, r"gamma must be >= 0, not -0.1"),
        ({"gamma": "much"}, r"gamma: 'much' is not a number"),
        ({"gamma": 1.0, "beta": 0}, r"beta must be > 0"),
        ({"gamma": 1.0, "gamma_beta_ratio": 0.5}, r"gamma and gamma_beta_ratio .*one of them"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), not 0.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing"),
        ({"label_smoothing": math.nan}, r"label_smoothing"),
        ({"link": "probit"}, r"link: 'probit' is not one of sigmoid, hinge"),
        ({"link": "hinge", "label_smoothing": 0.1}, r"label_smoothing .*'hinge'"),
        ({"bta": 2.0}, r"bta is not a hyperparameter of objective 'simpo'.*beta, gamma_beta_ratio"),
    ],
)
def test_bad_values_are_reported_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        SIMPO.resolve(given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "dpo",
            {"gamma": 1.0},
            r"gamma is not .* 'dpo' \(it belongs to simpo, alphapo, repo\); it has beta",
        ),
        ("simpo", {"tau": 0.1}, r"tau is not a hyperparameter of objective 'simpo' \(it belongs to ipo\)"),
        ("simpo", {"desirable_weight": 1.0}, r"desirable_weight .*\(it belongs to kto\)"),
        ("ipo", {"beta": 0.1}, r"beta is not .*; it has tau, length_normalized"),
        ("simper", {"beta": 2.0}, r"beta is not a hyperparameter of objective 'simper' .*; it has none"),
        ("kto", {"z_ref": 0.0}, r"z_ref is not a hyperparameter of objective 'kto'; it has beta, lam_w"),
        ("ipo", {"length_normalized": 1}, r"length_normalized: 1 is not true or false"),
        ("ipo", {"tau": 0}, r"tau must be > 0, not 0"),
        ("kto", {"lam_w": 1.0, "desirable_weight": 1.0}, r"desirable_weight and lam_w .*one of them"),
        ("kto", {"undesirable_weight": -1.0}, r"undesirable_weight must be >= 0, not -1.0"),
        ("cpo", {"lam": -0.5}, r"lam must be >= 0, not -0.5"),
        ("alphapo", {"alpha": math.nan}, r"alpha must be finite, not nan"),
        ("alphapo", {"alpha": math.inf}, r"alpha must be finite, not inf"),
        ("r_dpo", {"alpha": -0.1}, r"alpha must be >= 0, not -0.1"),
    ],
)
def test_bad_values_for_other_objectives_are_reported_by_name(name, given, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name].resolve(given)


@pytest.mark.parametrize(
    "name", [name for name, row in OBJECTIVES.items() if "label_smoothing" not in row.hyperparameters]
)
def test_label_smoothing_is_rejected_where_labels_have_no_likelihood(name):
    with pytest.raises(ValueError, match=rf"label_smoothing is not .* '{name}' \(it belongs to simpo, dpo"):
        OBJECTIVES[name].resolve({"label_smoothing": 0.1})


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if "label_smoothing" in row.hyperparameters])
def test_label_smoothing_is_accepted_elsewhere(name):
    assert OBJECTIVES[name].resolve({"label_smoothing": 0.1})["label_smoothing"] == 0.1
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\), not 0.5"):
        OBJECTIVES[name].resolve({"label_smoothing": 0.5})


def test_which_objectives_take_single_responses_or_need_more_than_log_probabilities():
    assert [name for name, row in OBJECTIVES.items() if "z_ref" in row.needs] == ["kto"]
    assert [name for name, row in OBJECTIVES.items() if "reward_shift" in row.needs] == ["bco"]
    assert [name for name, row in OBJECTIVES.items() if row.takes_unpaired] == ["kto", "bco"]


def test_alternative_spellings_of_ktos_weights():
    resolved = OBJECTIVES["kto"].resolve({"desirable_weight": 1.33, "undesirable_weight": 0.5})
    assert resolved == {"beta": 0.1, "lam_w": 1.33, "lam_l": 0.5}


def test_objectives_only_import_torch():
    others = ("transformers", "datasets", "accelerate", "peft")
    code = f"import simpo.objectives, sys; print([name for name in {others} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
