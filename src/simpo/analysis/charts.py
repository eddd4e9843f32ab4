"""The data behind a report's charts: training curves, overoptimization, and the SimPO paper's figures.

``page/charts.yaml`` defines titles, axes and notes; ``page/report.js`` draws the charts.
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

from simpo.analysis.headline import format_interval
from simpo.analysis.reading import Run
from simpo.runs.results import HELD_OUT, Metric, Stage
from simpo.statistics import Interval, rate_interval, spearman

Chart = dict[str, Any]
Point = tuple[float, float]

POINTS = 1000  # at most, per curve
SCATTERED = 2000  # pairs, at most, in a scatter plot
_CHARTS = yaml.safe_load((Path(__file__).parent / "page/charts.yaml").read_text(encoding="utf-8"))
_FIGURES = _CHARTS["figures"]
_SIDES = ("chosen", "rejected")


def make_chart(template: Chart, series: Sequence[Chart], total: int = 0, **values: Any) -> Chart:
    """Combine a chart's description from ``charts.yaml`` with its series, for the page's script.

    ``total`` is the number of data points before any are left out; ``values`` fills the placeholders in the texts.
    """
    values |= {"drawn": max((len(one["data"]) for one in series), default=0), "total": total}
    notes = [template.get("note", ""), template.get("reduced", "") if total > values["drawn"] else ""]
    axes = {axis: template[axis] | {"name": template[axis]["name"].format(**values)} for axis in "xy"}
    note = " ".join(filter(None, notes)).format(**values)
    return {"kind": "lines", **template, **axes, "note": note, "series": series}


def make_series(name: str, data: Iterable[tuple[Any, Any]], **more: Any) -> Chart:
    """Create a series of a chart; without a ``color``, it gets the color of its position in the chart."""
    return {"name": name, "data": [(round_for_chart(x), round_for_chart(y)) for x, y in data], **more}


def interval_series(name: str, points: Iterable[tuple[float, Interval | Metric]]) -> Chart:
    """Create a line through values with error bars, given as (x, interval) pairs."""
    rows = [(x, one.value, one.low, one.high) for x, one in points]
    bounded = [(x, low, high) for x, _, low, high in rows if low is not None and high is not None]
    bounds = [tuple(map(round_for_chart, bound)) for bound in bounded]
    return make_series(name, [(x, value) for x, value, _, _ in rows], bounds=bounds)


def round_for_chart(value: float) -> float:
    """Round to five significant digits, more than a chart can show."""
    value = float(value)
    if value and math.isfinite(value):
        value = round(value, 4 - math.floor(math.log10(abs(value))))
    return int(value) if value.is_integer() else value


# ---- Curves over optimizer steps.

_NOT_CURVES = {"step", "epoch", "total_flos", "train_loss"}
_TIMES = ("_runtime", "_per_second", "_preparation_time")


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Create a chart for each group of metrics that any run logged; ungrouped metrics get a chart each."""
    panels = _CHARTS["curves"]
    logged = {key for run in runs for key in run.logged}
    names = {key.removeprefix("eval_") for key in logged - _NOT_CURVES if not key.endswith(_TIMES)}
    others = sorted(names - {key for panel in panels for key in panel["keys"]})
    panels = [*panels, *({"title": key, "y": {"name": ""}, "keys": {key: key}} for key in others)]
    charts = [_curves_of(panel, runs) for panel in panels]
    return [chart for chart in charts if chart["series"]]


def _curves_of(panel: Chart, runs: Sequence[Run]) -> Chart:
    """Plot a panel's metrics for all runs, in training and on held-out rows."""
    series = []
    for run, (key, name), source in product(runs, panel["keys"].items(), ("training", "held out")):
        points = run.logged.get(key) if source == "training" else _held_out_curve(run, key)
        if points:
            series.append({"run": run.name, "metric": name, **make_series(source, downsample(points))})
    total = max((len(run.logged.get(key, ())) for run in runs for key in panel["keys"]), default=0)
    return make_chart(_CHARTS["curve"] | panel, series, total)


def _held_out_curve(run: Run, key: str) -> list[Point]:
    """Return a held-out metric by step, starting with the initial model's value at step 0 if its rows were scored."""
    points = list(run.logged.get(f"eval_{key}", ()))
    if points and points[0][0] > 0 and not (key == "rewards/accuracies" and run.starts_at_zero):
        values, weights = run.column("before", key), run.column("before", "weight")
        weights = np.where(np.isnan(values), 0.0, np.nan_to_num(weights, nan=1.0))
        if weights.any():
            points.insert(0, (0, float(np.average(np.nan_to_num(values), weights=weights))))
    return points


def downsample(points: Sequence[Point], most: int = POINTS) -> Sequence[Point]:
    """Reduce a curve to ``most`` points: the minimum and maximum of equal stretches, so that no spike disappears."""
    if len(points) <= most:
        return points
    values = np.array([value for _, value in points])
    stretches = np.array_split(np.arange(len(points)), most // 2)
    chosen = {int(part[pick(values[part])]) for part in stretches for pick in (np.argmin, np.argmax)}
    return [points[index] for index in sorted(chosen)]


# ---- Overoptimization: scores against the distance from the initial model (Gao et al. 2022, arXiv 2210.10760).


def distance(kl: float) -> float:
    """Return the square root of a KL divergence in nats, the x-axis of Gao et al.; 0 if the estimate is negative."""
    return math.sqrt(max(kl, 0.0))


def by_distance(runs: Sequence[Run]) -> Iterator[Chart]:
    """Plot scores of sampled answers and held-out win rates against the distance of online runs from their start.

    An evaluation is placed at the distance that was logged last before it.
    """
    for key, template in _CHARTS["by_distance"].items():
        series = []
        for color, run in enumerate(runs):
            points, kl = [], None
            for log in run.logs:
                kl = log.get("rollout/kl", kl)
                if isinstance(kl, int | float) and isinstance(value := log.get(key), int | float):
                    points.append((distance(kl), value))
            if points:
                series.append(make_series(run.name if len(runs) > 1 else key, downsample(points), color=color))
        if series:
            yield make_chart(template, series)


def rounds(run: Run) -> Iterator[Chart]:
    """Plot a loop's win rates and KL by round, and the win rates by distance from the start, with intervals."""
    rates: dict[str, dict[int, Metric]] = {}
    for metric in run.metrics:
        match = re.fullmatch(r"round-(\d+)/(kl|win_rate/.*)", metric.name)
        if match and metric.value is not None:
            rates.setdefault(match[2], {})[int(match[1])] = metric
    kl = rates.pop("kl", {})
    distances = {number: distance(metric.interval.value) for number, metric in kl.items()}
    templates = _CHARTS["rounds"]
    if rates:
        yield make_chart(templates["win_rate"], [interval_series(name, rate.items()) for name, rate in rates.items()])
    if kl:
        yield make_chart(templates["kl"], [interval_series("kl", kl.items())])
    if rates and kl:
        points = {
            name: [(distances[number], rate[number]) for number in rate if number in distances]
            for name, rate in rates.items()
        }
        yield make_chart(templates["by_distance"], [interval_series(*named) for named in points.items()])


# ---- The SimPO paper's figures for one run, from its held-out rows (Meng, Xia and Chen 2024, arXiv 2405.14734).

_HISTOGRAM_BINS = 40
_LENGTH_BINS = 6
_CONFIDENCE_BINS = 5
_POSITIONS = 64  # tokens of a response


@dataclass(frozen=True)
class Pairs:
    """The scores of a run's ``P`` held-out pairs at one stage."""

    rewards: np.ndarray  # [P, 2], chosen and rejected
    averages: np.ndarray  # [P, 2], log-probability per token
    lengths: np.ndarray  # [P, 2], tokens; NaN if unknown

    @property
    def margins(self) -> np.ndarray:
        """Chosen minus rejected reward, ``[P]``."""
        return self.rewards[:, 0] - self.rewards[:, 1]

    @classmethod
    def of(cls, run: Run, stage: Stage) -> Pairs | None:
        """Read the pairs of a stage; return None if the rows are not scored or not pairs."""
        rewards, logps = (
            np.stack([run.column(stage, f"{kind}/{side}") for side in _SIDES], axis=1) for kind in ("rewards", "logps")
        )
        lengths = [row.get("tokens") or [math.nan, math.nan] for row in run.held_out[stage] if row]
        if not len(rewards) or np.isnan(rewards).any() or any(len(several) != 2 for several in lengths):
            return None
        from simpo.objectives import OBJECTIVES  # noqa: PLC0415 - imports torch, which other reports do not need

        tokens, objective = np.array(lengths, dtype=np.float64), OBJECTIVES.get(str(run.settings.get("objective")))
        per_token = objective is not None and objective.average_logps
        return cls(rewards, logps if per_token else logps / tokens, tokens)


def paper_figures(run: Run) -> Iterator[Chart]:
    """Yield every figure for which the run has the data."""
    stages: dict[Stage, Pairs] = {stage: pairs for stage in HELD_OUT if (pairs := Pairs.of(run, stage)) is not None}
    if "before" not in stages:
        return
    last: Stage = "after" if "after" in stages else "before"
    yield _margins(run, stages)
    if run.starts_at_zero and last == "after":  # rewards of 0 do not rank anything
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
    edges = np.linspace(min(low, 0.0), max(high, 0.0) or 1.0, _HISTOGRAM_BINS + 1)
    series = []
    for stage, pairs in stages.items():
        counts, _ = np.histogram(np.clip(pairs.margins, edges[0], edges[-1]), edges)
        series.append(make_series(stage, zip((edges[1:] + edges[:-1]) / 2, counts, strict=True), steps=True))
    gamma = target_margin(run)
    marks = {"0": 0} if gamma is None else {"0": 0, "gamma": round_for_chart(gamma)}
    return make_chart(_FIGURES["margins"], series) | {"marks": marks}


def target_margin(run: Run) -> float | None:
    """Return gamma, the target reward margin of SimPO's loss; None for other objectives."""
    settings = run.settings
    if settings.get("objective") != "simpo":
        return None
    if isinstance(settings.get("gamma"), int | float):
        return float(settings["gamma"])
    beta, ratio = settings.get("beta"), settings.get("gamma_beta_ratio")
    return beta * ratio if isinstance(beta, int | float) and isinstance(ratio, int | float) else None


def _reward_and_length(stages: dict[Stage, Pairs], last: Stage) -> Chart:
    correlations = []
    for stage, pairs in stages.items():
        rho = spearman(pairs.lengths.ravel(), pairs.rewards.ravel())
        bounds = "" if rho.low is None or rho.high is None else f" [{rho.low:.2f}, {rho.high:.2f}]"
        text = "undefined (no variation)" if math.isnan(rho.value) else f"{rho.value:.2f}{bounds}"
        correlations.append(f"{stage} {text}")
    series = _scatter(stages[last].lengths, stages[last].rewards)
    return make_chart(_FIGURES["length"], series, len(stages[last].rewards), stage=last, rho="; ".join(correlations))


def _reward_and_likelihood(pairs: Pairs, last: Stage) -> Chart:
    """Compare how rewards and likelihoods rank pairs; generation follows the likelihood (the paper's section 4.2)."""
    by_reward, by_likelihood = pairs.margins > 0, pairs.averages[:, 0] > pairs.averages[:, 1]
    cells = [[int(((by_likelihood == a) & (by_reward == b)).sum()) for b in (True, False)] for a in (True, False)]
    agree = format_interval(rate_interval(by_reward == by_likelihood), percent=True)
    series = _scatter(pairs.averages, pairs.rewards)
    chart = make_chart(_FIGURES["likelihood"], series, len(by_reward), stage=last, agree=agree)
    return chart | {"cells": cells, "total": len(by_reward)}


def _scatter(x: np.ndarray, y: np.ndarray) -> list[Chart]:
    """Plot chosen and rejected responses, ``[P, 2]``, as points; a seeded sample if there are too many pairs."""
    sample = np.arange(len(x))
    if len(x) > SCATTERED:
        sample = np.random.default_rng(0).permutation(len(x))[:SCATTERED]
    return [make_series(side, zip(x[sample, k], y[sample, k], strict=True)) for k, side in enumerate(_SIDES)]


def _accuracy_by_length(stages: dict[Stage, Pairs]) -> Chart:
    differences = next(iter(stages.values())).lengths @ np.array([1.0, -1.0])
    edges = np.unique(np.quantile(differences, np.linspace(0, 1, _LENGTH_BINS + 1)))
    which = np.clip(np.searchsorted(edges, differences, "right") - 1, 0, max(0, len(edges) - 2))
    bins = [which == one for one in np.unique(which)]
    series = []
    for stage, pairs in stages.items():
        rates = (rate_interval(pairs.margins[one] > 0) for one in bins)
        series.append(interval_series(stage, enumerate(rates)))
    chart = make_chart(_FIGURES["accuracy_by_length"], series)
    chart["x"]["categories"] = [f"{differences[one].min():+.0f} to {differences[one].max():+.0f}" for one in bins]
    return chart


def _calibration(stages: dict[Stage, Pairs]) -> Chart:
    series, errors = [], []
    for stage, pairs in stages.items():
        confidence, right = special.expit(np.abs(pairs.margins)), pairs.margins > 0
        which = np.minimum(((confidence - 0.5) * 2 * _CONFIDENCE_BINS).astype(int), _CONFIDENCE_BINS - 1)
        points = [(confidence[which == one].mean(), rate_interval(right[which == one])) for one in np.unique(which)]
        series.append(interval_series(stage, points))
        error = sum(rate.n * abs(mean - rate.value) for mean, rate in points) / len(right)
        errors.append(f"{stage} {error:.3f}")
    return make_chart(_FIGURES["calibration"], series, errors=", ".join(errors))


def _by_position(run: Run) -> Iterator[Chart]:
    """Plot the mean of log(trained / start) at each token position of held-out responses."""
    series = []
    for side, name in enumerate(_SIDES):
        changes = defaultdict(list)
        for response in (row["responses"][side] for row in run.examples if len(row.get("responses", ())) == 2):
            tokens = zip(
                response.get("after") or (), response.get("logps") or (), range(1, _POSITIONS + 1), strict=False
            )
            for trained, start, position in tokens:
                if trained is not None and start is not None:  # None for unscored tokens and non-finite values
                    changes[position].append(trained - start)
        most = max(map(len, changes.values()), default=0)
        data = [(at, np.mean(values)) for at, values in sorted(changes.items()) if len(values) >= max(5, 0.1 * most)]
        if data:
            series.append(make_series(name, data))
    if series:
        yield make_chart(_FIGURES["position"], series, len(run.examples))
