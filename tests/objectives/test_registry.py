"""Hyperparameters: read from the signature, checked by name."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import pytest

from simpo.objectives import OBJECTIVES

SIMPO = OBJECTIVES["simpo"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_signature_is_the_schema(name):
    row = OBJECTIVES[name]
    declared = {
        parameter.name: parameter.default
        for parameter in inspect.signature(row.loss).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert {key: parameter.default for key, parameter in row.hyperparameters.items()} == declared
    assert row.resolve({}) == declared
    assert {parameter.name for parameter in row.hyperparameters.values()} == declared.keys()


def test_simpos_defaults():
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
        ({"link": "probit"}, r"link: 'probit' is not one of 'sigmoid', 'hinge'"),
        ({"link": "hinge", "label_smoothing": 0.1}, r"label_smoothing .*'hinge'"),
        ({"bta": 2.0}, r"bta is not a hyperparameter of objective 'simpo'.*beta, gamma_beta_ratio"),
    ],
)
def test_bad_values_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        SIMPO.resolve(given)


def test_the_reward_refuses_unknown_names():
    with pytest.raises(ValueError, match="bta is not a hyperparameter"):
        SIMPO.reward(None, bta=1.0)


def test_objectives_import_torch_only():
    others = ("transformers", "datasets", "accelerate", "peft")
    code = f"import simpo.objectives, sys; print([name for name in {others} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
