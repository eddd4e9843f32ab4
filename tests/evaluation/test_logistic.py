"""The logistic fit against scipy's optimum of the same objective, and optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from simpo.evaluation.preferences import fit_logistic, is_determined, log_loss


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x = np.column_stack([np.tanh(rng.normal(size=300)), rng.normal(size=300), np.ones(300)])
    y = np.clip(expit(x @ [-1.5, 0.8, -0.4]) + 0.2 * rng.normal(size=300), 0, 1)
    return x, y, rng.uniform(0.1, 2, size=300)


def objective(w, x, y, weights, penalty):
    p = expit(x @ w)
    return -(weights * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum() + penalty * np.abs(w).sum()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 10.0, 1000.0])
def test_the_fit_equals_scipys_minimum(problem, penalty):
    x, y, weights = problem
    found = fit_logistic(x, y, weights, penalty=penalty)

    def split(parts):  # w = positive - negative makes the penalty smooth
        return objective(parts[:3] - parts[3:], x, y, weights, 0.0) + penalty * parts.sum()

    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000}
    other = minimize(split, np.full(6, 0.1), method="L-BFGS-B", bounds=[(0, None)] * 6, options=options).x
    assert objective(found, x, y, weights, penalty) <= objective(other[:3] - other[3:], x, y, weights, penalty) + 1e-9
    assert found == pytest.approx(other[:3] - other[3:], abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 30.0])
def test_the_gradient_satisfies_the_optimality_conditions(problem, penalty):
    """Zero without a penalty; with one, the penalty opposite to the sign of each nonzero coefficient."""
    x, y, weights = problem
    w = fit_logistic(x, y, weights, penalty=penalty)
    slope = x.T @ (weights * (expit(x @ w) - y))
    for coefficient, at in zip(w, slope, strict=True):
        if coefficient:
            assert at == pytest.approx(-penalty * np.sign(coefficient), abs=1e-7)
        else:
            assert abs(at) <= penalty


def test_the_starting_point_does_not_matter_and_weights_act_as_repetitions(problem):
    x, y, _ = problem
    counts = np.arange(len(y)) % 3 + 1
    weighed = fit_logistic(x, y, counts.astype(float), penalty=2.0, start=np.array([3.0, -2.0, 1.0]))
    repeated = fit_logistic(np.repeat(x, counts, axis=0), np.repeat(y, counts), penalty=2.0)
    assert weighed == pytest.approx(repeated, abs=1e-8)


def test_a_constant_alone_gives_the_mean():
    y = np.array([1.0, 0.0, 0.25, 0.5])
    assert expit(fit_logistic(np.ones((4, 1)), y)) == pytest.approx(y.mean(), abs=1e-12)


def test_separable_rows_end_with_a_loss_of_zero():
    w = fit_logistic(np.ones((20, 1)), np.ones(20))
    assert np.isfinite(w).all() and log_loss(np.ones((20, 1)), np.ones(20), w).sum() < 1e-8


def test_which_rows_determine_their_coefficients(problem):
    x, y, weights = problem
    assert is_determined(x, fit_logistic(x, y, weights), weights)
    empty = np.column_stack([x, np.zeros(300)])
    assert is_determined(empty, fit_logistic(empty, y))
    alike = np.column_stack([x, x[:, 0] + x[:, 2]])
    assert not is_determined(alike, fit_logistic(alike, y))
    labels = (x[:, 0] > 0).astype(float)
    assert not is_determined(x, fit_logistic(x, labels))
    labels[x[:, 0] < -0.5] = 0.5  # part of the rows is separable
    partly = np.column_stack([np.where(x[:, 0] > 0, x[:, 0], 0), x[:, 2]])
    assert not is_determined(partly, fit_logistic(partly, np.where(x[:, 0] > 0, 1.0, y)))
