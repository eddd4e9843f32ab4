"""Held-out metrics of reward models against loops over single pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simpo.statistics import proportion_interval
from simpo.training.metrics import ACCURACY, LENGTHS, MARGINS, compare_rewards


def scores_of(margins: np.ndarray, lengths: np.ndarray):
    right = np.where(np.isnan(margins), np.nan, margins > 0)
    return {ACCURACY: np.nanmean(right, axis=1), MARGINS: margins, LENGTHS: lengths}


def reward_metrics(margins, lengths):
    scores = scores_of(margins, lengths)
    before = scores_of(-np.abs(margins), lengths)
    return {metric.name: metric for metric in compare_rewards(before, scores) if metric.stage == "after"}


def naive_calibration(pairs: list[float]) -> tuple[float, list[list[bool]]]:
    """Return the expected calibration error and, for each of five bins, which pairs are right."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(5)]
    for margin in pairs:
        p = 1 / (1 + math.exp(-margin))
        confidence = max(p, 1 - p)
        bins[min(int((confidence - 0.5) / 0.1), 4)].append((confidence, margin > 0))
    error = sum(
        len(members) * abs(sum(c for c, _ in members) / len(members) - sum(r for _, r in members) / len(members))
        for members in bins
        if members
    )
    return error / len(pairs), [[right for _, right in members] for members in bins]


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return rng.normal(0.7, 2.0, (200, 1)), rng.integers(-3, 4, (200, 1)).astype(float)


def test_pair_metrics_match_naive_loops(pairs):
    margins, lengths = pairs
    found = reward_metrics(margins, lengths)
    error, bins = naive_calibration(margins[:, 0].tolist())
    assert found["eval_calibration_error"].value == pytest.approx(error, abs=1e-12)
    assert found["eval_calibration_error"].low < found["eval_calibration_error"].high
    for number, members in enumerate(bins):
        metric = found[f"eval_calibration/0.{5 + number}-{(6 + number) / 10:.1f}"]
        expected = proportion_interval(sum(members), len(members))
        assert (metric.value, metric.low, metric.high, metric.n) == (
            expected.value,
            expected.low,
            expected.high,
            len(members),
        )
    probabilities = [1 / (1 + math.exp(-margin)) for margin in margins[:, 0]]
    assert found["eval_brier"].value == pytest.approx(np.mean([(1 - p) ** 2 for p in probabilities]), abs=1e-12)
    longer = [margin > 0 for margin, length in zip(margins[:, 0], lengths[:, 0], strict=True) if length > 0]
    shorter = [margin > 0 for margin, length in zip(margins[:, 0], lengths[:, 0], strict=True) if length < 0]
    for name, members in (("longer", longer), ("shorter", shorter)):
        metric = found[f"eval_{ACCURACY}/chosen_{name}"]
        assert (metric.value, metric.n) == (pytest.approx(np.mean(members)), len(members))
        assert metric.low < metric.value < metric.high


def test_ranking_metrics_match_naive_loops(pairs):
    """Pairs within a row are resampled together: the same values with wider intervals."""
    margins, lengths = (np.repeat(values, 3, axis=1) for values in pairs)
    margins[:50, 1:] = lengths[:50, 1:] = np.nan
    found, single = reward_metrics(margins, lengths), reward_metrics(*pairs)
    flat = margins[~np.isnan(margins)].tolist()
    error, bins = naive_calibration(flat)
    assert found["eval_calibration_error"].value == pytest.approx(error, abs=1e-12)
    counts = [found[name].n for name in found if "calibration/" in name]
    assert counts == [len(members) for members in bins]
    assert found["eval_brier"].value == pytest.approx(single["eval_brier"].value, abs=1e-12)  # rows have equal weight
    longer = found[f"eval_{ACCURACY}/chosen_longer"]
    expected = np.mean([m > 0 for m, n in zip(margins.ravel(), lengths.ravel(), strict=True) if n > 0])
    assert longer.value == pytest.approx(expected)
    pooled = proportion_interval(round(longer.value * longer.n), longer.n)
    assert longer.high - longer.low > 1.4 * (pooled.high - pooled.low)


def test_calibration_error_tells_a_good_model_from_an_overconfident_one():
    """Confidence that matches accuracy has no error; confidence of 0.99 with half the answers right has a large one."""
    p = 0.8
    margins = np.full((1000, 1), math.log(p / (1 - p)))
    margins[800:] *= -1
    assert reward_metrics(margins, np.ones((1000, 1)))["eval_calibration_error"].value == pytest.approx(0, abs=1e-9)
    boasting = np.full((1000, 1), math.log(0.99 / 0.01))
    boasting[::2] *= -1
    found = reward_metrics(boasting, np.ones((1000, 1)))
    assert found["eval_calibration_error"].value == pytest.approx(0.49)
    assert found["eval_calibration/0.9-1.0"].n == 1000
    assert found["eval_calibration/0.5-0.6"].value is None or math.isnan(found["eval_calibration/0.5-0.6"].value)
    assert found["eval_calibration/0.5-0.6"].n == 0
