"""The numbers in the charts of a report: curves of runs, and the paper's figures of one run.

``page/charts.yaml`` has their titles, axes and notes, and ``page/report.js`` draws them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import special

from simpo.analysis.headline import number
from simpo.analysis.reading import Run
from simpo.runs.results import HELD_OUT, Metric, Stage
from simpo.statistics import Interval, rate_interval, spearman

Chart = dict[str, Any]
Point = tuple[float, float]

POINTS = 1000  # of a curve
SCATTERED = 2000  # points of a scatter plot
_CHARTS = yaml.safe_load((Path(__file__).parent / "page/charts.yaml").read_text(encoding="utf-8"))
_FIGURES = _CHARTS["figures"]
_SIDES = ("chosen", "rejected")


def chart_of(described: Chart, series: Sequence[Chart], total: int = 0, **words: Any) -> Chart:
    """A chart for the page's script: as ``charts.yaml`` describes it, with these series.

    ``total`` is the number of values, not all of which may be drawn; ``words`` are what the texts have in braces.
    """
    words |= {"drawn": max((len(one["data"]) for one in series), default=0), "total": total}
    notes = [described.get("note", ""), described.get("reduced", "") if total > words["drawn"] else ""]
    axes = {axis: described[axis] | {"name": described[axis]["name"].format(**words)} for axis in "xy"}
    note = " ".join(filter(None, notes)).format(**words)
    return {"kind": "lines", **described, **axes, "note": note, "series": series}


def series_of(name: str, data: Iterable[tuple[Any, Any]], **more: Any) -> Chart:
    """A series of a chart, whose ``color`` is its place in the chart unless it is given."""
    return {"name": name, "data": [(rounded(x), rounded(y)) for x, y in data], **more}


def interval_series(name: str, found: Iterable[tuple[float, Interval | Metric]]) -> Chart:
    """A line through values with their intervals, each at its place on the x-axis."""
    rows = [(x, one.value, one.low, one.high) for x, one in found]
    bounds = [tuple(map(rounded, (x, low, high))) for x, _, low, high in rows if low is not None and high is not None]
    return series_of(name, [(x, value) for x, value, _, _ in rows], bounds=bounds)


def rounded(value: float) -> float:
    """To five significant digits, which is more than a chart can show."""
    value = float(value)
    if value and math.isfinite(value):
        value = round(value, 4 - math.floor(math.log10(abs(value))))
    return int(value) if value.is_integer() else value


# ---- Curves over optimizer steps.

_NOT_CURVES = {"step", "epoch", "total_flos", "train_loss"}
_TIMES = ("_runtime", "_per_second", "_preparation_time")


def curves(runs: Sequence[Run]) -> list[Chart]:
    """One chart for every group of metrics that any run has logged; what belongs to no group has a chart of its own."""
    panels = _CHARTS["curves"]
    logged = {key for run in runs for key in run.logged}
    names = {key.removeprefix("eval_") for key in logged - _NOT_CURVES if not key.endswith(_TIMES)}
    others = sorted(names - {key for panel in panels for key in panel["keys"]})
    panels = [*panels, *({"title": key, "y": {"name": ""}, "keys": {key: key}} for key in others)]
    charts = [_curves_of(panel, runs) for panel in panels]
    return [chart for chart in charts if chart["series"]]


def _curves_of(panel: Chart, runs: Sequence[Run]) -> Chart:
    """The curves of several metrics of all runs, in training and on held-out rows."""
    series = []
    for run, (key, name), source in product(runs, panel["keys"].items(), ("training", "held out")):
        points = run.logged.get(key) if source == "training" else _held_out(run, key)
        if points:
            series.append({"run": run.name, "metric": name, **series_of(source, thin(points))})
    total = max((len(run.logged.get(key, ())) for run in runs for key in panel["keys"]), default=0)
    return chart_of(_CHARTS["curve"] | panel, series, total)


def _held_out(run: Run, key: str) -> list[Point]:
    """The values on held-out rows by step, from the start model's on, where its rows were scored."""
    points = list(run.logged.get(f"eval_{key}", ()))
    if points and points[0][0] > 0 and not (key == "rewards/accuracies" and run.starts_at_zero):
        values, weights = run.column("before", key), run.column("before", "weight")
        weights = np.where(np.isnan(values), 0.0, np.nan_to_num(weights, nan=1.0))
        if weights.any():
            points.insert(0, (0, float(np.average(np.nan_to_num(values), weights=weights))))
    return points


def thin(points: Sequence[Point], most: int = POINTS) -> Sequence[Point]:
    """At most ``most`` points: the smallest and the largest of equal stretches, so that no spike disappears."""
    if len(points) <= most:
        return points
    values = np.array([value for _, value in points])
    stretches = np.array_split(np.arange(len(points)), most // 2)
    kept = {int(part[pick(values[part])]) for part in stretches for pick in (np.argmin, np.argmax)}
    return [points[index] for index in sorted(kept)]


# ---- Overoptimization: scores over the distance from the start model (Gao et al. 2022, arXiv 2210.10760).


def distance(kl: float) -> float:
    """The square root of a KL divergence in nats, the x-axis of Gao et al.; 0 for a negative estimate of it."""
    return math.sqrt(max(kl, 0.0))


def by_distance(runs: Sequence[Run]) -> Iterator[Chart]:
    """Scores of sampled answers and win rates of held-out answers over the distance of online runs from their start.

    An evaluation has the distance that was logged last before it.
    """
    for key, described in _CHARTS["by_distance"].items():
        series = []
        for color, run in enumerate(runs):
            points, kl = [], None
            for log in run.logs:
                kl = log.get("rollout/kl", kl)
                if isinstance(kl, int | float) and isinstance(value := log.get(key), int | float):
                    points.append((distance(kl), value))
            if points:
                series.append(series_of(run.name if len(runs) > 1 else key, thin(points), color=color))
        if series:
            yield chart_of(described, series)


def rounds(run: Run) -> Iterator[Chart]:
    """Win rates and KL of a loop over its rounds, and the win rates over the distance, with their intervals."""
    rates: dict[str, dict[int, Metric]] = {}
    for metric in run.metrics:
        match = re.fullmatch(r"round-(\d+)/(kl|win_rate/.*)", metric.name)
        if match and metric.value is not None:
            rates.setdefault(match[2], {})[int(match[1])] = metric
    kl = rates.pop("kl", {})
    away = {place: distance(metric.interval.value) for place, metric in kl.items()}
    described = _CHARTS["rounds"]
    if rates:
        yield chart_of(described["win_rate"], [interval_series(name, found.items()) for name, found in rates.items()])
    if kl:
        yield chart_of(described["kl"], [interval_series("kl", kl.items())])
    if rates and kl:
        known = {
            name: [(away[place], found[place]) for place in found if place in away] for name, found in rates.items()
        }
        yield chart_of(described["by_distance"], [interval_series(name, found) for name, found in known.items()])


# ---- The SimPO paper's figures for one run, from its held-out rows (Meng, Xia and Chen 2024, arXiv 2405.14734).

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
        rewards, logps = (
            np.stack([run.column(stage, f"{kind}/{side}") for side in _SIDES], axis=1) for kind in ("rewards", "logps")
        )
        lengths = [row.get("tokens") or [math.nan, math.nan] for row in run.held_out[stage] if row]
        if not len(rewards) or np.isnan(rewards).any() or any(len(several) != 2 for several in lengths):
            return None
        from simpo.objectives import OBJECTIVES  # noqa: PLC0415 - imports torch, which other reports do without

        tokens, objective = np.array(lengths, dtype=np.float64), OBJECTIVES.get(str(run.settings.get("objective")))
        per_token = objective is not None and objective.average_logps
        return cls(rewards, logps if per_token else logps / tokens, tokens)


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
    low, high = np.quantile(np.concatenate([pairs.margins for pairs in stages.values()]), (0.005, 0.995))
    edges = np.linspace(min(low, 0.0), max(high, 0.0) or 1.0, _BINS + 1)
    series = []
    for stage, pairs in stages.items():
        counts, _ = np.histogram(np.clip(pairs.margins, edges[0], edges[-1]), edges)
        series.append(series_of(stage, zip((edges[1:] + edges[:-1]) / 2, counts, strict=True), steps=True))
    gamma = target_margin(run)
    marks = {"0": 0} if gamma is None else {"0": 0, "gamma": rounded(gamma)}
    return chart_of(_FIGURES["margins"], series) | {"marks": marks}


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
    found = []
    for stage, pairs in stages.items():
        rho = spearman(pairs.lengths.ravel(), pairs.rewards.ravel())
        bounds = "" if rho.low is None or rho.high is None else f" [{rho.low:.2f}, {rho.high:.2f}]"
        text = "undefined (all are equal)" if math.isnan(rho.value) else f"{rho.value:.2f}{bounds}"
        found.append(f"{stage} {text}")
    series = _scattered(stages[last].lengths, stages[last].rewards)
    return chart_of(_FIGURES["length"], series, len(stages[last].rewards), stage=last, rho="; ".join(found))


def _reward_and_likelihood(pairs: Pairs, last: Stage) -> Chart:
    """Whether rewards rank pairs as likelihoods do, which generation follows (the paper's section 4.2)."""
    by_reward, by_likelihood = pairs.margins > 0, pairs.averages[:, 0] > pairs.averages[:, 1]
    cells = [[int(((by_likelihood == a) & (by_reward == b)).sum()) for b in (True, False)] for a in (True, False)]
    agree = number(rate_interval(by_reward == by_likelihood), percent=True)
    series = _scattered(pairs.averages, pairs.rewards)
    chart = chart_of(_FIGURES["likelihood"], series, len(by_reward), stage=last, agree=agree)
    return chart | {"cells": cells, "total": len(by_reward)}


def _scattered(x: np.ndarray, y: np.ndarray) -> list[Chart]:
    """Chosen and rejected responses, ``[P, 2]``, as points: of all pairs, or of a seeded sample."""
    drawn = np.arange(len(x))
    if len(x) > SCATTERED:
        drawn = np.random.default_rng(0).permutation(len(x))[:SCATTERED]
    return [series_of(side, zip(x[drawn, k], y[drawn, k], strict=True)) for k, side in enumerate(_SIDES)]


def _accuracy_by_length(stages: dict[Stage, Pairs]) -> Chart:
    differences = next(iter(stages.values())).lengths @ np.array([1.0, -1.0])
    edges = np.unique(np.quantile(differences, np.linspace(0, 1, _LENGTH_BINS + 1)))
    which = np.clip(np.searchsorted(edges, differences, "right") - 1, 0, max(0, len(edges) - 2))
    bins = [which == one for one in np.unique(which)]
    series = []
    for stage, pairs in stages.items():
        rates = (rate_interval(pairs.margins[one] > 0) for one in bins)
        series.append(interval_series(stage, enumerate(rates)))
    chart = chart_of(_FIGURES["accuracy_by_length"], series)
    chart["x"]["categories"] = [f"{differences[one].min():+.0f} to {differences[one].max():+.0f}" for one in bins]
    return chart


def _calibration(stages: dict[Stage, Pairs]) -> Chart:
    series, errors = [], []
    for stage, pairs in stages.items():
        confidence, right = special.expit(np.abs(pairs.margins)), pairs.margins > 0
        which = np.minimum(((confidence - 0.5) * 2 * _CONFIDENCE_BINS).astype(int), _CONFIDENCE_BINS - 1)
        found = [(confidence[which == one].mean(), rate_interval(right[which == one])) for one in np.unique(which)]
        series.append(interval_series(stage, found))
        error = sum(rate.n * abs(mean - rate.value) for mean, rate in found) / len(right)
        errors.append(f"{stage} {error:.3f}")
    return chart_of(_FIGURES["calibration"], series, errors=", ".join(errors))


def _by_position(run: Run) -> Iterator[Chart]:
    """The model's distance from the start: mean log(now / start) at each token position of held-out responses."""
    series = []
    for color, side in enumerate(_SIDES):
        changes = defaultdict(list)
        for response in (row["responses"][color] for row in run.examples if len(row.get("responses", ())) == 2):
            tokens = zip(
                response.get("after") or (), response.get("logps") or (), range(1, _POSITIONS + 1), strict=False
            )
            for now, start, place in tokens:
                if now is not None and start is not None:  # tokens that are not scored, or not finite
                    changes[place].append(now - start)
        most = max(map(len, changes.values()), default=0)
        data = [(place, np.mean(found)) for place, found in sorted(changes.items()) if len(found) >= max(5, 0.1 * most)]
        if data:
            series.append(series_of(side, data))
    if series:
        yield chart_of(_FIGURES["position"], series, len(run.examples))
