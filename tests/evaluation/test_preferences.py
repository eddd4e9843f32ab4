"""Statistics of verdicts against their definitions, and the coverage of their intervals."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from simpo.evaluation.compare import write_verdicts
from simpo.evaluation.preferences import Judged, length_controlled_win_rate, preference_metrics, win_rate_over_prompts
from simpo.judging.protocol import Pair
from simpo.judging.registry import make_judge
from simpo.judging.settings import JudgeOptions
from simpo.runs.files import read_lines
from simpo.world.questions import draw_answer, draw_question, full_answer


@pytest.fixture(scope="module")
def population():
    """Win rates ``[2000, 4]`` by the exact judge: two answers from each of two policies to every question."""
    rng = Random(0)
    pairs = []
    for number in range(2000):
        question = draw_question(rng, held_out=False)
        ours = [full_answer(question) if rng.random() < 0.2 else draw_answer(question, rng) for _ in range(2)]
        theirs = [draw_answer(question, rng) for _ in range(2)]
        pairs += [Pair(str(number), question.prompt, (a, b)) for a in ours for b in theirs]
    return np.array(make_judge("exact", JudgeOptions()).compare(pairs)).reshape(2000, 4)


def test_intervals_for_the_exact_judge_cover_the_true_win_rate(population):
    """1,000 runs of 50 prompts with four pairs each, drawn from a population with a known win rate."""
    truth = population.mean()
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(50), 4)
    covered = 0
    for seed in range(1000):
        found = win_rate_over_prompts(population[rng.integers(0, 2000, 50)].ravel(), prompts, seed)
        covered += found.low <= truth <= found.high
    assert 0.52 < truth < 0.65
    assert 930 <= covered <= 970


def test_win_rate_matches_its_definition():
    verdicts = np.array([1.0, 0.5, np.nan, 0.0, 0.75, np.nan])
    prompts = np.array([0, 0, 0, 1, 2, 3])
    found = win_rate_over_prompts(verdicts, prompts, seed=0)
    assert (found.value, found.n) == (pytest.approx((0.75 + 0.0 + 0.75) / 3), 3)
    assert win_rate_over_prompts(np.array([np.nan]), np.array([0]), seed=0) is None


def draw_verdicts(rng, prompts, pairs, constant, slope):
    """Draw clustered verdicts and lengths from a known model; return them with the true win rate at equal length."""
    longer = rng.normal(20, 100, prompts * pairs).round()
    chance = expit(constant + slope * np.tanh(longer / longer.std(ddof=1)))
    return (rng.random(prompts * pairs) < chance).astype(float), longer, np.repeat(np.arange(prompts), pairs)


def test_length_control_finds_the_optimum():
    verdicts, longer, prompts = draw_verdicts(np.random.default_rng(0), 90, 1, 0.4, 1.5)
    verdicts[:10] = 0.5
    x = np.column_stack([np.tanh(longer / longer.std(ddof=1)), np.ones(90)])
    best = minimize(lambda w: (np.logaddexp(0, x @ w) - verdicts * (x @ w)).sum(), np.zeros(2), tol=1e-12).x
    found = length_controlled_win_rate(verdicts, longer, prompts)
    assert found.value == pytest.approx(expit(best[1]), abs=1e-6)
    assert found.low < found.value < found.high and found.n == 90


def test_with_equal_lengths_length_control_gives_the_win_rate():
    """The interval has a closed form: the standard error of a mean on the logit scale."""
    verdicts = np.array([1.0] * 30 + [0.5] * 10 + [0.0] * 20)
    found = length_controlled_win_rate(verdicts, np.zeros(60), np.arange(60))
    mean = verdicts.mean()
    assert found.value == pytest.approx(mean, abs=1e-9)
    error = verdicts.std(ddof=1) / np.sqrt(60) / (mean * (1 - mean))
    assert logit(found.high) - logit(mean) == pytest.approx(2.000995 * error, rel=1e-6)  # Student's t, df 59
    assert logit(mean) - logit(found.low) == pytest.approx(2.000995 * error, rel=1e-6)


def test_length_control_clusters_by_prompt():
    """Duplicated pairs add no information."""
    verdicts, longer, prompts = draw_verdicts(np.random.default_rng(0), 60, 1, 0.4, 1.5)
    once = length_controlled_win_rate(verdicts, longer, prompts)
    spread = longer.std(ddof=1) / np.repeat(longer, 2).std(ddof=1)
    twice = length_controlled_win_rate(np.repeat(verdicts, 2), np.repeat(longer, 2), np.repeat(prompts, 2))
    assert spread == pytest.approx(1, abs=0.01)
    assert (twice.low, twice.value, twice.high) == pytest.approx((once.low, once.value, once.high), abs=1e-3)
    assert twice.n == 60


def test_length_controlled_intervals_have_their_coverage():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found = length_controlled_win_rate(*draw_verdicts(rng, 50, 2, 0.3, 1.0))
        covered += found.low <= expit(0.3) <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_length_control_gives_no_value_if_it_is_not_identified():
    lengths = np.array([-3.0, -1.0, 2.0, 5.0])
    assert length_controlled_win_rate((lengths > 0).astype(float), lengths, np.arange(4)) is None
    # The longer answer always wins; verdicts vary only for equal lengths.
    partly = np.array([0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0])
    assert length_controlled_win_rate(partly, np.array([-3.0, -1.0, 2.0, 5.0, 2.0, -1.0, 4.0]), np.arange(7)) is None
    far = np.array([-900.0, -903.0, -901.0, -902.0])  # no length difference near zero, where the prediction is made
    assert length_controlled_win_rate(np.array([1.0, 0.0, 1.0, 0.0]), far, np.arange(4)) is None
    one = length_controlled_win_rate(np.array([1.0, 0.0, 1.0, 0.0]), lengths, np.zeros(4, dtype=int))
    assert one.low is None and one.n == 1
    alike = length_controlled_win_rate(np.ones(4), lengths, np.arange(4))
    assert (alike.value, alike.low, alike.high) == (1.0, None, None)


def judged(*verdicts, prompts=None):
    rows = [np.array(row, dtype=float) for row in verdicts]
    pairs = [Pair(f"p{i}", f"question {i}", ("a" * (i + 1), "b")) for i in range(len(rows[0]))]
    numbers = np.arange(len(pairs)) if prompts is None else np.array(prompts)
    return Judged(pairs, numbers, dict(zip(("one", "two", "three"), rows, strict=False)))


def test_agreement_matches_its_definition():
    nan = np.nan
    given = judged([1, 1, 0, 0.5, 0.75, nan, 0], [1, 0, 0, 0.5, 1, 1, nan])
    found = {metric.name: metric for metric in preference_metrics(given, seed=0)}
    assert found["agreement/one+two"].value == 4 / 5 and found["agreement/one+two"].n == 5
    counts_one, counts_two = [1, 1, 3], [2, 1, 2]  # b, tie, a
    expected = sum(x * y for x, y in zip(counts_one, counts_two, strict=True)) / 25
    assert found["kappa/one+two"].value == pytest.approx((0.8 - expected) / (1 - expected))
    assert (found["without_verdict/one"].value, found["without_verdict/one"].n) == (1, 7)
    assert found["ties/one"].value == pytest.approx(1 / 6)


def test_a_judge_without_any_verdict_has_no_rates_or_agreement():
    found = {m.name: m for m in preference_metrics(judged([1, 0], [0, 1], [np.nan, np.nan]), seed=0)}
    assert {name for name in found if name.startswith("kappa/")} == {
        "kappa/one+two",
        "kappa/one+three",
        "kappa/two+three",
    }
    for name in ("win_rate/three", "length_controlled_win_rate/three", "ties/three", "kappa/one+three"):
        assert found[name].value is None
    assert found["without_verdict/three"].value == 2


def test_verdicts_are_written_with_their_answers(tmp_path):
    given = Judged([Pair("p", "question", ("a\ud800", "b"))], np.array([0]), {"one": np.array([1.0])})
    write_verdicts(tmp_path / "v.jsonl", given)
    [row] = read_lines(tmp_path / "v.jsonl")
    assert (row["id"], row["a"], row["verdicts"]) == ("p", "a\ud800", {"one": 1.0})
