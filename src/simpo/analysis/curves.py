"""Curves of runs over their optimizer steps, as charts that the report's script draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simpo.analysis.reading import Run

Chart = dict[str, Any]
Point = tuple[float, float]

POINTS = 1000  # of a curve
_ACCURACY = "eval_rewards/accuracies"
_NOT_CURVES = {"step", "epoch", "total_flos", "train_loss"}
_TIMES = ("_runtime", "_per_second", "_preparation_time")


@dataclass(frozen=True)
class Panel:
    """A chart of related metrics: ``keys`` are their names, each with what its curve is called."""

    title: str
    unit: str
    keys: dict[str, str]
    note: str = ""


_PANELS = (
    Panel("Loss", "nats", {"loss": "loss"}),
    Panel(
        "Reward accuracy",
        "share of pairs",
        {"rewards/accuracies": "accuracy"},
        "Pairs whose chosen response has the larger reward.",
    ),
    Panel("Reward margin", "reward", {"rewards/margins": "margin"}, "Chosen reward minus rejected reward."),
    Panel("Rewards", "reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Panel(
        "Log-probabilities",
        "nats",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        "Per token for length-normalized objectives, per response for the others.",
    ),
    Panel("KL from the start model", "nats", {"kl": "per token", "rollout/kl": "per answer"}),
    Panel("Win rate against the start model", "share of prompts", {"generations/win_rate": "win rate"}),
    Panel("Length of answers", "tokens", {"generations/length": "greedy answers", "rollout/length": "sampled answers"}),
    Panel(
        "Endings and repetition",
        "share",
        {
            "generations/end_of_turn_rate": "ended",
            "generations/distinct_2": "distinct bigrams",
            "rollout/ended": "sampled, ended",
        },
        "Few distinct bigrams mean repetition.",
    ),
    Panel("Score of sampled answers", "score", {"rollout/reward": "score"}),
    Panel("Score of sampled answers by the gold annotator", "score", {"rollout/gold": "score"}),
    Panel(
        "Policy",
        "",
        {"policy/ratio": "importance ratio", "policy/clip_fraction": "clipped tokens", "policy/entropy": "entropy"},
    ),
    Panel("Gradient norm", "", {"grad_norm": "norm"}, "Before clipping."),
    Panel("Learning rate", "", {"learning_rate": "rate"}),
)


def curves(runs: Sequence[Run]) -> list[Chart]:
    """One chart for every group of metrics that any run has logged; what belongs to no group has a chart of its own."""
    logged = {key for run in runs for key in run.logged}
    names = {key.removeprefix("eval_") for key in logged - _NOT_CURVES if not key.endswith(_TIMES)}
    grouped = {key for panel in _PANELS for key in panel.keys}
    others = [Panel(key, "", {key: key}) for key in sorted(names - grouped)]
    charts = [_chart(panel, runs) for panel in (*_PANELS, *others)]
    return [chart for chart in charts if chart["series"]]


def _chart(panel: Panel, runs: Sequence[Run]) -> Chart:
    series: list[Chart] = []
    present = {key for key in panel.keys for run in runs if key in run.logged or f"eval_{key}" in run.logged}
    for number, run in enumerate(runs):
        for place, key in enumerate(key for key in panel.keys if key in present):
            for source, name in (("training", key), ("held out", f"eval_{key}")):
                points = _points(run, name, start=source == "held out")
                if points:
                    label = ", ".join([*([panel.keys[key]] if len(present) > 1 else []), source])
                    several = {"name": run.name, "label": f"{run.name}, {label}", "color": number, "dash": place}
                    color = place if len(present) > 1 else source == "held out"
                    one = series_of(label, color, thin(points), thin=source == "training")
                    series.append(one | several if len(runs) > 1 else one)
    drawn = max((len(one["data"]) for one in series), default=0)
    most = max((len(run.logged.get(key, ())) for run in runs for key in present), default=0)
    note = panel.note
    if len(runs) > 1 and len({one["thin"] for one in series}) > 1:
        note = f"{note} Thin lines: training; thick lines: held out.".strip()
    if len(runs) > 1 and len(present) > 1:
        kinds = [panel.keys[key] for key in panel.keys if key in present]
        styles = zip(("Solid", "dashed", "dotted"), kinds, strict=False)
        note = f"{note} {'; '.join(f'{style}: {kind}' for style, kind in styles)}.".strip()
    if most > drawn:
        note = f"{note} {drawn:,} of {most:,} values are drawn: the smallest and the largest of every stretch.".strip()
    y = {"name": panel.unit, "log": panel.title == "Gradient norm", "share": "share" in panel.unit}
    return chart_of(panel.title, series, {"name": "optimizer step"}, y, note)


def chart_of(title: str, series: list[Chart], x: Chart, y: Chart, note: str = "", **more: Any) -> Chart:
    """A chart as the page's script draws it: of lines, or of another ``kind``; ``x`` and ``y`` are its axes."""
    return {"kind": "lines", "title": title, "note": note, "series": series, "x": x, "y": y} | more


def series_of(name: str, color: int, data: Sequence[tuple[Any, Any]], **more: Any) -> Chart:
    """A series of a chart; ``color`` is a number, the same for what belongs together.

    The legend shows every name once. Series of the same name have a ``label`` to tell them apart.
    """
    return {"name": name, "color": color, "data": data, "dash": 0, "thin": False} | more


def _points(run: Run, name: str, *, start: bool) -> list[Point]:
    """The logged values by step; held-out ones begin with the start model's, where its rows were scored."""
    points = list(run.logged.get(name, ()))
    if start and points and points[0][0] > 0:
        values, weights = (run.column("before", column) for column in (name.removeprefix("eval_"), "weight"))
        weights = np.where(np.isnan(values), 0.0, np.nan_to_num(weights, nan=1.0))
        if weights.any() and not (name == _ACCURACY and run.starts_at_zero):
            points.insert(0, (0, float(np.average(np.nan_to_num(values), weights=weights))))
    return points


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most ``most`` points: the smallest and the largest of equal stretches, so that no spike disappears."""
    if len(points) > most:
        stretches = np.array_split(np.arange(len(points)), most // 2)
        values = np.array([value for _, value in points])
        kept = sorted({int(part[pick(values[part])]) for part in stretches for pick in (np.argmin, np.argmax)})
        points = [points[index] for index in kept]
    return [(rounded(x), rounded(y)) for x, y in points]


def rounded(value: float) -> float:
    """To five significant digits, which is more than a chart can show."""
    if value == 0 or not math.isfinite(value):
        return value
    digits = 4 - math.floor(math.log10(abs(value)))
    result = round(float(value), digits)
    return int(result) if result.is_integer() else result


# ---- Overoptimization: scores over the distance from the start model (Gao et al. 2022, arXiv 2210.10760).

_DISTANCE: Chart = {"name": "square root of the KL from the start (nats)"}
_OVEROPTIMIZATION = "Where the score that is trained on rises and another one falls, training exploits the annotator."
_SCORED = {
    "rollout/reward": ("Score by the annotator, by distance from the start", "score"),
    "rollout/gold": ("Score by the gold annotator, by distance from the start", "score"),
    "eval_generations/win_rate": ("Win rate against the start, by distance from it", "share of prompts"),
}


def distance(kl: float) -> float:
    """The square root of a KL divergence in nats, the x-axis of Gao et al.; 0 for a negative estimate of it."""
    return math.sqrt(max(kl, 0.0))


def by_distance(runs: Sequence[Run]) -> Iterable[Chart]:
    """Scores of sampled answers and win rates of held-out answers over the distance of online runs from their start.

    An evaluation has the distance that was logged last before it.
    """
    for key, (title, unit) in _SCORED.items():
        series = []
        for number, run in enumerate(runs):
            points, kl = [], None
            for log in run.logs:
                kl = log.get("rollout/kl", kl)
                if isinstance(kl, int | float) and isinstance(value := log.get(key), int | float):
                    points.append((distance(kl), value))
            if points:
                series.append(series_of(run.name if len(runs) > 1 else key, number, thin(points)))
        if series:
            share = "share" in unit
            more: dict[str, Any] = {"kind": "points"} | ({"even": 0.5} if share else {})
            yield chart_of(title, series, _DISTANCE, {"name": unit, "share": share}, _OVEROPTIMIZATION, **more)


def rounds(run: Run) -> Iterable[Chart]:
    """Win rates and KL of a loop over its rounds, and the win rates over the distance, with their intervals."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for metric in run.metrics:
        head, _, name = metric.name.partition("/")
        if head.startswith("round-") and metric.value is not None and (name == "kl" or name.startswith("win_rate/")):
            found.setdefault(name, []).append((int(head[6:]), metric))
    for title, unit, chosen in (
        ("Win rate against the start, by round", "share of prompts", [name for name in found if name != "kl"]),
        ("KL from the start, by round", "nats per answer", [name for name in found if name == "kl"]),
    ):
        series = [interval_series(name, number, found[name]) for number, name in enumerate(chosen)]
        if series:
            share = "share" in unit
            more: dict[str, Any] = {"even": 0.5} if share else {}
            yield chart_of(title, series, {"name": "round", "whole": True}, {"name": unit, "share": share}, **more)
    kl = {number: distance(metric.value) for number, metric in found.get("kl", ())}
    series = [
        interval_series(name, number, [(kl[place], metric) for place, metric in found[name] if place in kl])
        for number, name in enumerate(name for name in found if name != "kl")
    ]
    if kl and series:
        y = {"name": "share of prompts", "share": True}
        title = "Win rate against the start, by distance from it"
        yield chart_of(title, series, _DISTANCE, y, _OVEROPTIMIZATION, even=0.5)


def interval_series(name: str, color: int, found: Iterable[tuple[float, Any]]) -> Chart:
    """A line through values with their intervals; ``found`` are places with anything that has value, low and high."""
    rows = list(found)
    bounds = [
        (rounded(x), rounded(one.low), rounded(one.high))
        for x, one in rows
        if one.low is not None and one.high is not None
    ]
    return series_of(name, color, [(rounded(x), rounded(one.value)) for x, one in rows], bounds=bounds)
