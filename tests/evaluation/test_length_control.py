"""AlpacaEval 2 win rates: closed forms always; the published leaderboard if its data is next to the repository."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from simpo.evaluation.alpaca_eval import read_baselines
from simpo.evaluation.preferences import (
    STRENGTHS,
    Baselines,
    cross_validated_strength,
    fit_logistic,
    folds,
    length_controlled,
    predicted_preferences,
    win_rates,
)

_DATA = Path(__file__).resolve().parents[2] / "../shared/data/alpaca_eval"
published = pytest.mark.skipif(not _DATA.is_dir(), reason="the leaderboard's data is not available")


def test_win_rates_match_their_definition():
    found = win_rates(np.array([2.0, 1.5, 1.0, 1.75, 1.25]))
    shares = [1.0, 0.5, 0.0, 0.75, 0.25]
    assert found["win_rate"] == pytest.approx(50)
    assert found["standard_error"] == pytest.approx(100 * np.std(shares, ddof=1) / 5**0.5)
    assert (found["n_wins"], found["n_draws"], found["n_wins_base"]) == (2, 1, 2)
    assert found["discrete_win_rate"] == pytest.approx(100 * 2.5 / 5)


@pytest.mark.parametrize("n", [5, 13, 100])
def test_folds_assign_each_group_to_the_smallest_fold(n):
    """scikit-learn's GroupKFold written out, for groups of two rows each."""
    sizes, load, place = np.full(n, 2), np.zeros(5), np.empty(n, dtype=int)
    for group in np.argsort(sizes, kind="stable")[::-1]:
        place[group] = load.argmin()
        load[place[group]] += sizes[group]
    assert [mask.tolist() for mask in folds(n)] == [(place == fold).tolist() for fold in range(5)]


@pytest.fixture
def world():
    """Judged answers with preferences that follow the model exactly, and two gamed baselines."""
    rng = np.random.default_rng(0)
    difficulties, w = rng.normal(size=200), np.array([-1.5, 0.7, 0.3])
    gamed = np.column_stack([np.tanh(rng.normal(size=400)), np.tile(difficulties, 2), np.zeros(400)])
    baselines = Baselines(difficulties, gamed, expit(gamed @ w))
    theirs, ours = rng.integers(500, 3000, size=(2, 200))
    relative = np.tanh((theirs - ours) / (theirs - ours).std(ddof=1))
    preferences = 1 + expit(np.column_stack([relative, difficulties, np.ones(200)]) @ w)
    return preferences, theirs, ours, baselines, w


def test_an_exactly_logistic_model_is_recovered(world):
    preferences, theirs, ours, baselines, w = world
    found = length_controlled(preferences, theirs, ours, baselines, strength=1e6)
    assert found.coefficients == pytest.approx(w, abs=1e-4)
    expected = expit(w[1] * baselines.difficulties + w[2])
    assert found.win_rate == pytest.approx(100 * expected.mean(), abs=1e-3)
    assert found.standard_error == pytest.approx(100 * expected.std(ddof=1) / 200**0.5, abs=1e-3)


def test_answers_of_equal_length_are_not_corrected(world):
    preferences, theirs, ours, baselines, w = world
    longer = length_controlled(preferences, theirs, ours + 10_000, baselines, strength=1e6)
    assert win_rates(preferences)["win_rate"] != pytest.approx(longer.win_rate, abs=1)
    at_equal = 1 + expit(np.column_stack([np.zeros(200), baselines.difficulties, np.ones(200)]) @ w)
    same = length_controlled(at_equal, theirs, theirs, baselines, strength=1e6)
    assert same.win_rate == pytest.approx(win_rates(at_equal)["win_rate"], abs=1e-3)


def test_rows_without_a_preference_are_predicted_but_not_fitted(world):
    preferences, theirs, ours, baselines, w = world
    holes = preferences.copy()
    holes[::7] = np.nan
    found = length_controlled(holes, theirs, ours, baselines, strength=1e6)
    assert found.win_rate == pytest.approx(100 * expit(w[1] * baselines.difficulties + w[2]).mean(), abs=1e-3)


def test_the_baseline_scores_50(world):
    _, theirs, _, baselines, _ = world
    found = length_controlled(np.full(200, 1.5), theirs, theirs, baselines)
    assert (found.win_rate, found.standard_error) == (50.0, 0.0)


def test_rows_of_gamed_baselines_count_a_tenth(world):
    """The penalized loss written out, with gamed baselines whose preferences contradict the model's."""
    preferences, theirs, ours, baselines, _ = world
    baselines = baselines._replace(y=1 - baselines.y)
    relative = np.tanh((theirs - ours) / (theirs - ours).std(ddof=1))
    x = np.column_stack([relative, baselines.difficulties, np.ones(200)])

    def loss(w):
        gamed, own = baselines.x @ w, x @ w
        cross_entropy = 0.1 * (np.logaddexp(0, gamed) - baselines.y * gamed).sum()
        return cross_entropy + (np.logaddexp(0, own) - (preferences - 1) * own).sum() + np.abs(w).sum() / 5

    best = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}).x
    found = length_controlled(preferences, theirs, ours, baselines, strength=5.0)
    assert found.coefficients == pytest.approx(best, abs=1e-4)


def test_cross_validation_chooses_the_strength_with_the_lowest_held_out_loss():
    rng = np.random.default_rng(3)
    x = np.column_stack([rng.normal(size=(60, 2)), np.ones(60)])
    y, weights = rng.uniform(size=60), np.where(np.arange(60) < 30, 0.1, 1.0)
    losses = []
    for strength in STRENGTHS:
        total = 0.0
        for fold in range(5):
            held_out = np.arange(60)[::-1] % 5 == fold
            w = fit_logistic(x[~held_out], y[~held_out], weights[~held_out] * strength, penalty=1.0)
            p = expit(x[held_out] @ w)
            loss = -(y[held_out] * np.log(p) + (1 - y[held_out]) * np.log(1 - p))
            total += (weights[held_out] * loss).mean()
        losses.append(total)
    assert cross_validated_strength(x, y, weights) == STRENGTHS[np.argmin(losses)]


def rows_in(name):
    with (_DATA / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gamed")
    (folder / "gamed.csv").write_bytes(gzip.decompress((_DATA / "gamed_reconstructed.csv.gz").read_bytes()))
    return read_baselines(folder / "gamed.csv", _DATA / "instruction_difficulty.csv")


@pytest.fixture(scope="module")
def leaderboard(baselines):
    """For each model: its published row, its metrics, and its length-controlled win rates with both strengths."""
    found = {}
    for row in rows_in("published.csv"):
        with gzip.open(_DATA / f"{row['model']}.jsonl.gz", "rt") as file:
            judged = [json.loads(line) for line in file]
        preferences = np.array([np.nan if line["preference"] is None else line["preference"] for line in judged])
        lengths = [np.array([line[key] for line in judged]) for key in ("len_1", "len_2")]
        own = length_controlled(preferences, *lengths, baselines)
        same = own
        if row["C_from_kkt"]:
            same = length_controlled(preferences, *lengths, baselines, strength=float(row["C_from_kkt"]))
        raw = win_rates(preferences[~np.isnan(preferences)])
        found[row["model"]] = row, raw, int(lengths[1].mean()), own, same
    return found


@published
def test_raw_metrics_equal_the_published_ones(leaderboard):
    assert len(leaderboard) == 15
    for row, raw, length, _, _ in leaderboard.values():
        assert {name: float(row[name]) for name in raw} == pytest.approx(raw, abs=1e-8)
        judged = raw["n_wins"] + raw["n_draws"] + raw["n_wins_base"]
        assert judged == int(row["n_total"])
        assert length == int(row["avg_length"]) or judged < 805


@published
def test_length_controlled_win_rates_equal_the_published_ones(leaderboard):
    """Within 0.2 points with a strength we choose ourselves, median below 0.01; within 0.02 with the published one."""
    off = {"own": [], "same": []}
    for row, _, _, own, same in leaderboard.values():
        off["own"].append(abs(own.win_rate - float(row["length_controlled_winrate"])))
        off["same"].append(abs(same.win_rate - float(row["length_controlled_winrate"])))
        if row["lc_standard_error"]:
            assert own.standard_error == pytest.approx(float(row["lc_standard_error"]), abs=1e-3)
    assert max(off["own"]) < 0.2 and np.median(off["own"]) < 0.01
    assert max(off["same"]) < 0.02


@published
def test_models_rank_as_published(leaderboard):
    ours = sorted(leaderboard, key=lambda model: leaderboard[model][3].win_rate)
    theirs = sorted(leaderboard, key=lambda model: float(leaderboard[model][0]["length_controlled_winrate"]))
    assert ours == theirs


@published
def test_predictions_from_published_coefficients_equal_the_published_win_rates(baselines):
    for row in rows_in("published_no_annotations.csv"):
        coefficients = np.array([float(row[f"coef_{name}"]) for name in ("tanh_len", "difficulty", "model")])
        found = predicted_preferences(baselines.difficulties, coefficients)
        assert 100 * found.mean() == pytest.approx(float(row["length_controlled_winrate"]), abs=1e-6), row["model"]
