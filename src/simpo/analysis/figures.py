"""The SimPO paper's figures for one run, from its held-out rows (Meng, Xia and Chen 2024, arXiv 2405.14734)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from simpo.analysis.curves import Chart, chart_of, interval_series, rounded, series_of
from simpo.analysis.headline import number
from simpo.analysis.reading import Run
from simpo.runs.results import HELD_OUT, Stage
from simpo.statistics import Interval, rate_interval, spearman

SCATTERED = 2000  # points of a scatter plot
_BINS = 40  # of a histogram
_LENGTH_BINS = 6
_CONFIDENCE_BINS = 5
_POSITIONS = 64  # tokens of a response


@dataclass(frozen=True)
class Pairs:
    """The held-out pairs of a run at one stage, ``[P]`` each: rewards, log-probabilities per token, and lengths."""

    rewards: np.ndarray  # [P, 2], chosen and rejected
    averages: np.ndarray  # [P, 2]
    lengths: np.ndarray  # [P, 2], tokens; NaN where they are not known

    @property
    def margins(self) -> np.ndarray:
        """``[P]`` the chosen reward minus the rejected one."""
        return self.rewards[:, 0] - self.rewards[:, 1]

    @classmethod
    def of(cls, run: Run, stage: Stage) -> Pairs | None:
        """The pairs of a stage; None if its rows are not scored, or are not pairs."""
        rows = [row for row in run.held_out[stage] if row]
        sides = ("chosen", "rejected")
        rewards = np.stack([run.column(stage, f"rewards/{side}") for side in sides], axis=1)
        if not len(rewards) or np.isnan(rewards).any():
            return None
        counts = [row.get("tokens") or [math.nan, math.nan] for row in rows]
        if any(len(several) != 2 for several in counts):
            return None
        lengths = np.array(counts, dtype=np.float64)
        logps = np.stack([run.column(stage, f"logps/{side}") for side in sides], axis=1)
        return cls(rewards, logps if averages_logps(run) else logps / lengths, lengths)


def averages_logps(run: Run) -> bool:
    """Whether the run's ``logps/*`` are averages over tokens already; its objective decides."""
    from simpo.objectives import OBJECTIVES  # noqa: PLC0415 - imports torch, which most reports do without

    objective = OBJECTIVES.get(str(run.settings.get("objective")))
    return objective is not None and objective.average_logps


def paper_figures(run: Run) -> Iterator[Chart]:
    """Every figure that the run's files allow; those that they do not are absent."""
    stages: dict[Stage, Pairs] = {stage: pairs for stage in HELD_OUT if (pairs := Pairs.of(run, stage)) is not None}
    if "before" not in stages:
        return
    last: Stage = "after" if "after" in stages else "before"
    yield _margins(run, stages)
    if run.starts_at_zero and last == "after":  # a reward of 0 ranks nothing
        del stages["before"]
    if not np.isnan(stages[last].lengths).any():
        yield _reward_and_length(stages, last)
        yield _accuracy_by_length(stages)
    if not np.isnan(stages[last].averages).any():
        yield _reward_and_likelihood(stages[last], last)
    yield _calibration(stages)
    yield from _by_position(run)


def _margins(run: Run, stages: dict[Stage, Pairs]) -> Chart:
    values = np.concatenate([pairs.margins for pairs in stages.values()])
    low, high = np.quantile(values, (0.005, 0.995))
    edges = np.linspace(min(low, 0.0), max(high, 0.0) or 1.0, _BINS + 1)
    series = []
    for color, (stage, pairs) in enumerate(stages.items()):
        counts, _ = np.histogram(np.clip(pairs.margins, edges[0], edges[-1]), edges)
        centers = (edges[1:] + edges[:-1]) / 2
        data = [(rounded(x), int(count)) for x, count in zip(centers, counts, strict=True)]
        series.append(series_of(stage, color, data, steps=True))
    marks = [{"x": 0, "name": "0"}]
    if (gamma := target_margin(run)) is not None:
        marks.append({"x": rounded(gamma), "name": "gamma"})
    note = "Right of 0, the pair is ranked correctly. The outermost bins also hold the 0.5% beyond them."
    return chart_of(
        "Distribution of reward margins", series, {"name": "reward margin"}, {"name": "pairs"}, note, marks=marks
    )


def target_margin(run: Run) -> float | None:
    """The margin that SimPO's loss aims at, gamma."""
    settings = run.settings
    if settings.get("objective") != "simpo":
        return None
    if isinstance(settings.get("gamma"), int | float):
        return float(settings["gamma"])
    beta, ratio = settings.get("beta"), settings.get("gamma_beta_ratio")
    return beta * ratio if isinstance(beta, int | float) and isinstance(ratio, int | float) else None


def _reward_and_length(stages: dict[Stage, Pairs], last: Stage) -> Chart:
    rho = {stage: spearman(pairs.lengths.ravel(), pairs.rewards.ravel()) for stage, pairs in stages.items()}
    shown = "; ".join(
        f"{stage} {'undefined (all are equal)' if math.isnan(found.value) else f'{found.value:.2f}{_bounds(found)}'}"
        for stage, found in rho.items()
    )
    pairs = stages[last]
    note = f"Spearman's rho of reward and length: {shown}. Far from 0, length is rewarded or punished for itself."
    axes: tuple[Chart, Chart] = {"name": "tokens of the response"}, {"name": f"reward, {last}"}
    return _scattered("Reward and length", pairs.lengths, pairs.rewards, axes, note)


def _reward_and_likelihood(pairs: Pairs, last: Stage) -> Chart:
    """Whether rewards rank pairs as likelihoods do, which generation follows (the paper's section 4.2)."""
    by_reward, by_likelihood = pairs.margins > 0, pairs.averages[:, 0] > pairs.averages[:, 1]
    n = len(by_reward)
    cells = [[int((by_likelihood == a) @ (by_reward == b).astype(int)) for b in (True, False)] for a in (True, False)]
    table = {
        "head": ["", "reward ranks it right", "reward ranks it wrong"],
        "rows": [
            [name, *(f"{count:,} ({count / n:.0%})" for count in row)]
            for name, row in zip(("likelihood ranks it right", "likelihood ranks it wrong"), cells, strict=True)
        ],
    }
    agree = rate_interval(by_reward == by_likelihood)
    note = f"The two rank {number(agree, percent=True)} of {n:,} pairs alike; what is generated follows the likelihood."
    axes: tuple[Chart, Chart] = {"name": f"average log-probability of a token, {last}"}, {"name": f"reward, {last}"}
    return _scattered("Reward and likelihood", pairs.averages, pairs.rewards, axes, note, table=table)


def _accuracy_by_length(stages: dict[Stage, Pairs]) -> Chart:
    differences = next(iter(stages.values())).lengths @ np.array([1.0, -1.0])
    edges = np.unique(np.quantile(differences, np.linspace(0, 1, _LENGTH_BINS + 1)))
    which = np.clip(np.searchsorted(edges, differences, "right") - 1, 0, max(0, len(edges) - 2))
    bins = np.unique(which)
    names = [f"{differences[which == one].min():+.0f} to {differences[which == one].max():+.0f}" for one in bins]
    series = []
    for color, (stage, pairs) in enumerate(stages.items()):
        right = pairs.margins > 0
        found = [(place, rate_interval(right[which == one])) for place, one in enumerate(bins)]
        series.append(interval_series(stage, color, found))
    note = "A model that prefers longer responses is wrong on the left and right on the right. Bars: 95%, Wilson."
    x = {"name": "tokens of chosen minus rejected", "categories": names}
    y = {"name": "reward accuracy", "share": True}
    return chart_of("Accuracy by difference in length", series, x, y, note, even=0.5)


def _calibration(stages: dict[Stage, Pairs]) -> Chart:
    series, errors = [], []
    for color, (stage, pairs) in enumerate(stages.items()):
        confidence = special.expit(np.abs(pairs.margins))
        right = pairs.margins > 0
        which = np.minimum(((confidence - 0.5) * 2 * _CONFIDENCE_BINS).astype(int), _CONFIDENCE_BINS - 1)
        inside = [which == one for one in range(_CONFIDENCE_BINS) if (which == one).any()]
        found = [(float(confidence[one].mean()), rate_interval(right[one])) for one in inside]
        series.append(interval_series(stage, color, found))
        error = sum(int(one.sum()) * abs(x - share.value) for one, (x, share) in zip(inside, found, strict=True)) / len(
            right
        )
        errors.append(f"{stage} {error:.3f}")
    note = (
        "Confidence is sigmoid(|margin|), the Bradley-Terry probability of the higher reward. Expected calibration "
        f"error: {', '.join(errors)}."
    )
    x = {"name": "confidence", "min": 0.5, "max": 1, "share": True}
    return chart_of("Calibration", series, x, {"name": "share that is right", "share": True}, note, diagonal=True)


def _by_position(run: Run) -> Iterator[Chart]:
    """The model's distance from the start: mean log(now / start) at each token position of held-out responses."""
    series = []
    for color, side in enumerate(("chosen", "rejected")):
        sums, counts = np.zeros(_POSITIONS), np.zeros(_POSITIONS)
        for row in run.examples:
            responses = row.get("responses", ())
            if len(responses) == 2 and responses[color].get("after") and responses[color].get("logps"):
                now, start = (responses[color][stage][:_POSITIONS] for stage in ("after", "logps"))
                for place, (one, other) in enumerate(zip(now, start, strict=False)):
                    if one is not None and other is not None:  # tokens that are not scored, or not finite
                        sums[place] += one - other
                        counts[place] += 1
        enough = counts >= max(5, 0.1 * counts.max())
        data = [(int(place) + 1, rounded(sums[place] / counts[place])) for place in np.flatnonzero(enough)]
        if data:
            series.append(series_of(side, color, data))
    if series:
        note = (
            f"Mean of log(trained / start) of the k-th token of {len(run.examples):,} held-out pairs. With the "
            "opposite sign and over the start model's own answers, it estimates the KL divergence of a token."
        )
        x = {"name": "token of the response", "whole": True}
        yield chart_of("Change of log-probability by position", series, x, {"name": "nats"}, note, zero=True)


def _scattered(title: str, x: np.ndarray, y: np.ndarray, axes: tuple[Chart, Chart], note: str, **more: Any) -> Chart:
    """Chosen and rejected responses, ``[P, 2]``, as points: of all pairs, or of a seeded sample."""
    n = len(x)
    drawn = np.arange(n)
    if n > SCATTERED:
        drawn = np.random.default_rng(0).permutation(n)[:SCATTERED]
        note += f" {SCATTERED:,} of {n:,} pairs are drawn, chosen at random; the numbers are of all."
    series = [
        series_of(side, k, [(rounded(a), rounded(b)) for a, b in zip(x[drawn, k], y[drawn, k], strict=True)])
        for k, side in enumerate(("chosen", "rejected"))
    ]
    return chart_of(title, series, *axes, note, kind="points", **more)


def _bounds(found: Interval) -> str:
    return "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
