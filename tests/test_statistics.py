from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from simpo import statistics
from simpo.statistics import (
    bootstrap_interval,
    cohen_kappa,
    krippendorff_alpha,
    krippendorff_terms,
    mcnemar,
    mean_interval,
    proportion_interval,
    share_interval,
    spearman,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (263, 500)])
def test_proportion_interval_agrees_with_scipy(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    interval = proportion_interval(successes, n)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_proportion_interval_equals_a_published_value():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263.
    interval = proportion_interval(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    assert (interval.n, interval.method) == (263, "Wilson 95%")


def test_proportion_interval_solves_the_score_equation():
    # By definition, the estimate is 1.96 standard errors away from a bound p0, with p0's own standard error.
    interval = proportion_interval(13, 40)
    for bound in (interval.low, interval.high):
        z = abs(interval.value - bound) / np.sqrt(bound * (1 - bound) / 40)
        assert z == pytest.approx(stats.norm.ppf(0.975), rel=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(1, 20), (7, 20), (19, 20), (263, 500)])
def test_shares_of_zeros_and_ones_have_wilson_intervals(successes, n):
    """With Student's t quantile, and a variance for n - 1 trials."""
    found = share_interval([1.0] * successes + [0.0] * (n - successes))
    share, z = successes / n, stats.t.ppf(0.975, n - 1)
    for bound in (found.low, found.high):  # the score equation
        assert abs(share - bound) / np.sqrt(bound * (1 - bound) / (n - 1)) == pytest.approx(z, rel=1e-9)


def test_shares_stay_between_0_and_1_where_the_symmetric_interval_does_not():
    values = [1.0, 1.0, 1.0, 1.0, 0.5]
    assert mean_interval(values).high > 1
    found = share_interval(values)
    assert found.value == pytest.approx(0.9)
    assert 0 < found.low < found.value < found.high < 1
    opposite = share_interval(1 - np.array(values))
    assert (opposite.low, opposite.high) == pytest.approx((1 - found.high, 1 - found.low))
    weighted = share_interval(values, [1.0, 1.0, 1.0, 1.0, 9.0])
    assert 0 < weighted.low < weighted.value < weighted.high < 1
    assert (share_interval([0.5, 0.5]).low, share_interval([0.5, 0.5]).high) == (None, None)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.95])
def test_share_intervals_have_their_coverage(probability):
    n = 40
    intervals = [share_interval([1.0] * k + [0.0] * (n - k)) for k in range(1, n)]
    weights = stats.binom.pmf(np.arange(1, n), n, probability)
    covered = sum(w for w, i in zip(weights, intervals, strict=True) if i.low <= probability <= i.high)
    assert covered / weights.sum() > 0.93


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.8])
def test_proportion_intervals_have_their_coverage(probability):
    n = 60
    intervals = [proportion_interval(k, n) for k in range(n + 1)]
    weights = stats.binom.pmf(np.arange(n + 1), n, probability)
    covered = sum(w for w, i in zip(weights, intervals, strict=True) if i.low <= probability <= i.high)
    assert 0.93 < covered < 0.975


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_rejected(successes, n):
    with pytest.raises(ValueError, match="not a proportion"):
        proportion_interval(successes, n)


def test_mean_interval_agrees_with_scipy():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=17)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    interval = mean_interval(values)
    assert interval.value == pytest.approx(values.mean(), rel=1e-12)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_mean_interval_equals_its_closed_form():
    # Student's t with 2 degrees of freedom has the quantile (2p - 1) sqrt(2 / (4 p (1 - p))): 4.3027.
    quantile = 0.95 * np.sqrt(2 / (4 * 0.975 * 0.025))
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.high - interval.value == pytest.approx(quantile / np.sqrt(3), rel=1e-9)


def test_mean_intervals_have_their_coverage():
    samples = np.random.default_rng(1).normal(size=(4000, 5))
    covered = np.mean([i.low <= 0 <= i.high for i in map(mean_interval, samples)])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000)


def test_the_mean_of_one_value_has_no_bounds():
    interval = mean_interval([2.5])
    assert (interval.value, interval.low, interval.high, interval.n) == (2.5, None, None, 1)
    undefined = mean_interval([np.nan])
    assert np.isnan(undefined.value) and (undefined.low, undefined.high) == (None, None)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_mean_rejects_other_shapes(values):
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval(values)


def _outcomes(gained, lost, kept=3, failed=2):
    before = [False] * gained + [True] * lost + [True] * kept + [False] * failed
    after = [True] * gained + [False] * lost + [True] * kept + [False] * failed
    return np.array(before), np.array(after)


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (1, 0), (3, 3), (7, 2), (2, 7), (10, 0)])
def test_mcnemar_counts_equally_likely_outcomes(gained, lost):
    tosses = list(itertools.product((0, 1), repeat=gained + lost))
    expected = sum(sum(toss) >= gained for toss in tosses) / len(tosses)
    assert mcnemar(*_outcomes(gained, lost)) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_agrees_with_scipy_for_many_items():
    expected = stats.binomtest(130, 230, alternative="greater").pvalue
    assert mcnemar(*_outcomes(130, 100, kept=500, failed=500)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_changes_has_a_p_value_of_1():
    assert mcnemar(*_outcomes(0, 0)) == 1.0
    assert mcnemar(np.array([], dtype=bool), np.array([], dtype=bool)) == 1.0


def test_mcnemar_controls_false_positives():
    generator = np.random.default_rng(2)
    p = [mcnemar(*(generator.random((2, 200)) < 0.6)) for _ in range(2000)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(
    ("before", "after"),
    [([True, False], [True]), ([[True]], [[True]]), ([0.2, 0.7], [True, False]), ([True], [1])],
)
def test_mcnemar_rejects_other_arrays(before, after):
    with pytest.raises(ValueError, match="boolean"):
        mcnemar(before, after)


def test_weighted_mean_with_equal_weights_is_the_mean():
    values = np.random.default_rng(0).normal(size=40)
    found, plain = mean_interval(values, np.full(40, 3.0)), mean_interval(values)
    assert found.value == pytest.approx(plain.value)
    assert (found.low, found.high) == (pytest.approx(plain.low), pytest.approx(plain.high))


def test_weighted_mean_has_its_coverage():
    """For a share of words whose values are correlated within sentences, 95% of the intervals contain the truth."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        sizes = rng.integers(1, 40, size=60)
        shares = rng.beta(2, 2, size=60)
        found = mean_interval(shares, sizes)
        hits += found.low <= 0.5 <= found.high
    assert 0.92 <= hits / 400 <= 0.975


@pytest.mark.parametrize(("values", "weights"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_weighted_mean_needs_one_weight_per_value(values, weights):
    with pytest.raises(ValueError, match="one weight for each value"):
        mean_interval(values, weights)


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def test_bootstrap_of_a_mean_agrees_with_scipy():
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=150)
    sums = np.column_stack([values, np.ones(150)])
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    found = bootstrap_interval(sums, ratio, seed=0, resamples=20_000)
    assert (found.value, found.n) == (values.mean(), 150)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.004)
    assert bootstrap_interval(sums, ratio, seed=0, resamples=20_000) == found
    assert bootstrap_interval(sums, ratio, seed=1, resamples=20_000) != found


def test_bootstrap_resamples_whole_items():
    """The bootstrap of a ratio by its definition: every resample draws whole items."""
    sums = np.random.default_rng(0).random((20, 2))
    rng = np.random.default_rng(7)
    resampled = [ratio(sums[rng.integers(0, 20, 20)].sum(0)) for _ in range(300)]
    found = bootstrap_interval(sums, ratio, seed=7, resamples=300)
    assert found.value == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), rel=1e-12)


def test_bootstrap_of_a_family_holds_jointly():
    """Bonferroni by its definition; in 95% of cases all six means of normal values are inside their intervals."""
    sums = np.random.default_rng(0).random((20, 2))
    rng = np.random.default_rng(7)
    resampled = [ratio(sums[rng.integers(0, 20, 20)].sum(0)) for _ in range(6 * 300)]
    found = bootstrap_interval(sums, ratio, seed=7, resamples=300, family=6)
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(resampled, [0.025 / 6, 1 - 0.025 / 6])), rel=1e-12
    )
    assert "6" in found.method
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap_interval(np.column_stack([values, np.ones(400)]), ratio, seed=0, family=6)
    half = stats.norm.ppf(1 - 0.025 / 6) * values.std() / 20
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.1)


def test_bootstrap_in_parts_gives_the_same_interval(monkeypatch):
    sums = np.random.default_rng(0).random((20, 2))
    whole = bootstrap_interval(sums, ratio, seed=7, resamples=300)
    monkeypatch.setattr(statistics, "_MAX_DRAWS", 170)  # eight resamples
    assert bootstrap_interval(sums, ratio, seed=7, resamples=300) == whole


def test_bootstrap_of_identical_items_has_no_interval():
    found = bootstrap_interval(np.ones((9, 2)), ratio, seed=0)
    assert (found.value, found.low, found.high, found.n) == (1.0, None, None, 9)
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap_interval(np.ones((0, 2)), ratio, seed=0)


def test_kappa_matches_a_worked_example():
    # Two readers of 50 proposals: both yes 20, both no 15; observed agreement 0.7, chance agreement 0.5.
    assert cohen_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4, rel=1e-12)


def test_kappa_matches_its_definition():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 3, 200)
    second = np.where(rng.random(200) < 0.6, first, rng.integers(0, 3, 200))
    table = np.zeros((3, 3))
    np.add.at(table, (first, second), 1)
    expected = sum((first == c).mean() * (second == c).mean() for c in range(3))
    kappa = ((first == second).mean() - expected) / (1 - expected)
    assert cohen_kappa(table) == pytest.approx(kappa, rel=1e-12)
    assert cohen_kappa(np.stack([table, 7 * table, table.T])) == pytest.approx([kappa] * 3, rel=1e-12)


def test_kappa_has_the_expected_extremes():
    assert cohen_kappa(np.diag([3, 4, 5])) == 1
    assert cohen_kappa(np.outer([0.2, 0.8], [0.6, 0.4])) == pytest.approx(0, abs=1e-15)
    assert cohen_kappa(np.array([[0, 5], [5, 0]])) == -1
    assert np.isnan(cohen_kappa(np.array([[7, 0], [0, 0]])))


def _counts(*raters: str) -> np.ndarray:
    """Return how often each category occurs per unit; a dot is a missing rating."""
    categories = sorted({rating for row in raters for rating in row} - {"."})
    return np.array([[unit.count(category) for category in categories] for unit in zip(*raters, strict=True)])


@pytest.mark.parametrize(
    ("raters", "published"),
    [
        # Krippendorff, Computing Krippendorff's alpha-reliability (2011), examples A, B and C.
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
    ],
)
def test_alpha_equals_published_examples(raters, published):
    assert krippendorff_alpha(krippendorff_terms(_counts(*raters)).sum(0)) == pytest.approx(published, abs=5e-4)


def test_alpha_matches_its_definition():
    rng = np.random.default_rng(0)
    ratings = np.where(rng.random((5, 30)) < 0.4, -1, rng.integers(0, 3, (5, 30)))  # -1 is missing
    ratings[:, 0], ratings[1:, 1] = -1, -1
    observed, values = 0.0, []
    for unit in ratings.T:
        given = unit[unit >= 0]
        if len(given) >= 2:
            values += list(given)
            pairs = list(itertools.permutations(given, 2))
            observed += sum(a != b for a, b in pairs) / (len(given) - 1)
    everything = list(itertools.permutations(values, 2))
    expected = sum(a != b for a, b in everything) / len(everything)
    counts = np.stack([(ratings == category).sum(0) for category in range(3)], axis=1)
    sums = krippendorff_terms(counts).sum(0)
    assert krippendorff_alpha(sums) == pytest.approx(1 - observed / len(values) / expected, rel=1e-12)
    assert krippendorff_alpha(np.stack([sums, sums])).shape == (2,)


def test_alpha_has_the_expected_extremes():
    assert krippendorff_alpha(krippendorff_terms(np.diag([2, 3, 4])).sum(0)) == 1
    assert np.isnan(krippendorff_alpha(krippendorff_terms(np.array([[2, 0], [3, 0]])).sum(0)))
    assert np.isnan(krippendorff_alpha(krippendorff_terms(np.array([[1, 0], [0, 1]])).sum(0)))


def test_spearman_agrees_with_scipy_and_its_interval_has_its_coverage():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, 200)
    y = x + rng.normal(0, 3, 200)
    found = spearman(x, y)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert spearman([1, 1, 1, 1], [1, 2, 3, 4]).low is None
    truth = stats.spearmanr(*np.random.default_rng(1).multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 200_000).T)
    draws = [rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 100).T for _ in range(300)]
    covered = [one.low <= truth.statistic <= one.high for one in (spearman(*draw) for draw in draws)]
    assert 0.91 <= np.mean(covered) <= 0.99
