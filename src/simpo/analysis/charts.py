"""The charts of a report, as data that its script draws: curves of runs, and the paper's figures of one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from simpo.analysis.headline import number
from simpo.analysis.reading import Run
from simpo.runs.results import HELD_OUT, Stage
from simpo.statistics import Interval, rate_interval, spearman

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
    for place_of_run, run in enumerate(runs):
        for place, key in enumerate(key for key in panel.keys if key in present):
            for source, name in (("training", key), ("held out", f"eval_{key}")):
                points = _points(run, name, start=source == "held out")
                if points:
                    label = ", ".join([*([panel.keys[key]] if len(present) > 1 else []), source])
                    several = {"name": run.name, "label": f"{run.name}, {label}", "color": place_of_run, "dash": place}
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
        for color, run in enumerate(runs):
            points, kl = [], None
            for log in run.logs:
                kl = log.get("rollout/kl", kl)
                if isinstance(kl, int | float) and isinstance(value := log.get(key), int | float):
                    points.append((distance(kl), value))
            if points:
                series.append(series_of(run.name if len(runs) > 1 else key, color, thin(points)))
        if series:
            yield _progress_chart(title, series, _DISTANCE, unit, _OVEROPTIMIZATION, kind="points")


def rounds(run: Run) -> Iterable[Chart]:
    """Win rates and KL of a loop over its rounds, and the win rates over the distance, with their intervals."""
    rates: dict[str, list[tuple[int, Any]]] = {}
    kl: list[tuple[int, Any]] = []
    for metric in run.metrics:
        head, _, name = metric.name.partition("/")
        if head.startswith("round-") and metric.value is not None:
            if name == "kl":
                kl.append((int(head[6:]), metric))
            elif name.startswith("win_rate/"):
                rates.setdefault(name, []).append((int(head[6:]), metric))
    x = {"name": "round", "whole": True}
    if rates:
        series = [interval_series(name, color, found) for color, (name, found) in enumerate(rates.items())]
        yield _progress_chart("Win rate against the start, by round", series, x, "share of prompts")
    if kl:
        yield _progress_chart("KL from the start, by round", [interval_series("kl", 0, kl)], x, "nats per answer")
    if rates and kl:
        away = {place: distance(metric.value) for place, metric in kl}
        series = [
            interval_series(name, color, [(away[place], metric) for place, metric in found if place in away])
            for color, (name, found) in enumerate(rates.items())
        ]
        title = "Win rate against the start, by distance from it"
        yield _progress_chart(title, series, _DISTANCE, "share of prompts", _OVEROPTIMIZATION)


def _progress_chart(title: str, series: list[Chart], x: Chart, unit: str, note: str = "", **more: Any) -> Chart:
    """A chart whose y-axis has this unit, with a line where neither side wins if that is a share of wins."""
    share = "share" in unit
    return chart_of(title, series, x, {"name": unit, "share": share}, note, **({"even": 0.5} if share else {}), **more)


def interval_series(name: str, color: int, found: Iterable[tuple[float, Any]]) -> Chart:
    """A line through values with their intervals; ``found`` are places with anything that has value, low and high."""
    rows = list(found)
    bounds = [
        (rounded(x), rounded(one.low), rounded(one.high))
        for x, one in rows
        if one.low is not None and one.high is not None
    ]
    return series_of(name, color, [(rounded(x), rounded(one.value)) for x, one in rows], bounds=bounds)


# ---- The SimPO paper's figures for one run, from its held-out rows (Meng, Xia and Chen 2024, arXiv 2405.14734).

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
