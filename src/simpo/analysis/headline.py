"""The headline of a report: each measurement before and after training, the change, and its uncertainty.

``page/headline.yaml`` defines the kinds of measurements and their wording.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
import yaml

from simpo.analysis.reading import Run
from simpo.runs.results import HELD_OUT, Stage
from simpo.statistics import Interval, mean_interval, proportion_interval, rate_interval

Direction = Literal["better", "worse", "unclear", "unknown"]


@dataclass(frozen=True)
class Kind:
    """A kind of measurement: one row of ``headline.yaml``, which explains the fields."""

    label: str
    sentence: str
    without_before: str = ""
    metric: str = ""
    commands: tuple[str, ...] = ()
    no_difference: float | None = None
    verdicts: tuple[str, str, str] = ("It got better", "It got worse", "No clear change")
    share: bool = True  # whether it is a share, shown in percent
    smaller_is_better: bool = False  # as for a loss
    logged: bool = False  # whether to fall back to the value logged last

    def matches(self, name: str, command: str, has_before: bool) -> bool:
        """Whether this kind covers the metric; ``has_before`` tells whether there is a value from before training."""
        of_run = not self.commands or command in self.commands
        return of_run and has_before == ("{before}" in self.sentence) and re.fullmatch(self.metric, name) is not None


_ROWS = yaml.safe_load((Path(__file__).parent / "page/headline.yaml").read_text(encoding="utf-8"))
_RESULTS = [Kind(**row) for row in _ROWS["results"]]
_HELD_OUT = [Kind(**row) for row in _ROWS["held_out"]]


@dataclass(frozen=True)
class Measure:
    """One measurement of a run."""

    kind: Kind
    after: Interval  # for the trained model
    before: Interval | None  # for the initial model; None if that does not apply
    change: Interval | None  # paired change on the same rows; None if the rows are not available
    names: Mapping[str, str]  # values for the placeholders in its texts, apart from numbers

    @property
    def no_difference(self) -> float | None:
        """The value that means no difference, if there is no ``before`` to compare with."""
        return self.kind.no_difference if self.before is None else None

    @property
    def direction(self) -> Direction:
        """Whether the 95% interval excludes "no difference", and on which side; unknown without a comparison."""
        interval, low, high = self.after, self.no_difference, self.no_difference
        if self.change is not None:
            interval, low, high = self.change, 0.0, 0.0
        elif self.before is not None:  # unpaired: the difference is clear if the intervals do not overlap
            low, high = self.before.low, self.before.high
        if low is None or high is None:
            return "unknown" if self.before is None else "unclear"
        if interval.low is None or interval.high is None or (interval.low <= high and interval.high >= low):
            return "unclear"
        return "better" if (interval.low > high) is not self.kind.smaller_is_better else "worse"

    @property
    def label(self) -> str:
        """The name of the measurement as shown in the report."""
        return self.kind.label.format(**self.names)

    @property
    def verdict(self) -> str:
        """The :attr:`direction` in words; raises KeyError if it is ``"unknown"``."""
        wording = dict(zip(("better", "worse", "unclear"), self.kind.verdicts, strict=True))
        return wording[self.direction].format(**self.names)

    @property
    def statement(self) -> str:
        """The headline's sentence about this measurement."""
        sentence = self.kind.sentence if self.before else self.kind.without_before or self.kind.sentence
        values = {"before": self.text(self.before), "after": self.text(self.after), "n": f"{self.after.n:,}"}
        return sentence.format(**values, **self.names) + (f" ({self.change_text})" if self.change else "")

    @property
    def change_text(self) -> str:
        """The change with its interval; empty if it is not known."""
        unit = " points" if self.kind.share else ""
        return (
            "" if self.change is None else format_interval(self.change, percent=self.kind.share, sign=True, unit=unit)
        )

    def text(self, interval: Interval | None) -> str:
        """Format a value with its interval."""
        return "" if interval is None else format_interval(interval, percent=self.kind.share)

    @property
    def axis(self) -> tuple[float, float]:
        """The range of an axis that holds all values and bounds; 0 to 1 for shares."""
        shown = [end for one in (self.before, self.after) if one for end in (one.value, one.low, one.high)]
        ends = [end for end in (*shown, self.no_difference) if end is not None]
        space = 0.15 * (max(ends) - min(ends)) or 1.0
        return (0.0, 1.0) if self.kind.share else (min(ends) - space, max(ends) + space)


def format_interval(interval: Interval, *, percent: bool = False, sign: bool = False, unit: str = "%") -> str:
    """Format a value with its interval, as in ``63.7% [61.3, 66.1]``."""

    def shown(value: float) -> str:
        form = ".1f" if percent else ",.0f" if abs(value) >= 10_000 else ".4g"
        return f"{(100 if percent else 1) * value:{'+' if sign else ''}{form}}".replace("-", "\N{MINUS SIGN}")

    value, low, high = interval.value, interval.low, interval.high
    bounds = "" if low is None or high is None else f" [{shown(low)}, {shown(high)}]"
    return f"{shown(value)}{unit if percent else ''}{bounds}"


# ---- The measurements of a run.

_FROM_BEST_TRIAL = ("best/eval_rewards/accuracies", "best/eval_generations/win_rate")  # also in the trial's own results


def measurements(run: Run) -> list[Measure]:
    """Collect everything that shows whether the run's model got better, the most informative first."""
    trained = run.trained
    kinds = [kind for kind in _HELD_OUT if not kind.commands or trained.record.command in kind.commands]
    return [*_from_results(run), *(measure for kind in kinds for measure in _from_held_out_rows(trained, kind))]


def deciding_measure(measures: Sequence[Measure]) -> Measure | None:
    """Return the measurement that decides the verdict: the first one with something to compare with."""
    return next((measure for measure in measures if measure.direction != "unknown"), None)


def _from_results(run: Run) -> Iterator[Measure]:
    """Yield the measurements in ``results.json``, in file order; for a loop, those of its last round."""
    rounds = [int(metric.name[6:].partition("/")[0]) for metric in run.metrics if metric.name.startswith("round-")]
    models = _model_names(run)
    for metric in run.metrics:
        name = metric.name.removeprefix(f"round-{max(rounds)}/") if rounds else metric.name
        before = run.metric(metric.name, "before")
        kind = next((kind for kind in _RESULTS if kind.matches(name, run.record.command, before is not None)), None)
        if kind is None or metric.value is None or metric.stage == "before":
            continue
        if name in _FROM_BEST_TRIAL and run.trained is not run:
            continue
        judge = name.partition("/")[2]
        ties = run.metric(f"ties/{judge}")
        names = models | {
            "name": name.removeprefix("best/"),
            "judged": f", judged by {judge}" if judge else "",
            "ties": f" ({100 * ties.value:.1f}% are ties, which count half)" if ties and ties.value else "",
        }
        paired = run.metric(f"{name}/difference") or run.metric(f"{name.rpartition('/')[0]}/difference")
        start, change = (before.interval, paired.interval if paired else None) if before else (None, None)
        yield Measure(kind, metric.interval, start, change, names)


def _model_names(run: Run) -> dict[str, str]:
    """Return the names of the compared models, in parentheses; only the last path component if that is unambiguous."""
    names = {side: str(run.settings.get(side, "")) for side in "ab"}
    short = {side: PurePath(name).name for side, name in names.items()}
    return {side: f" ({name})" if name else "" for side, name in (short if short["a"] != short["b"] else names).items()}


def _from_held_out_rows(run: Run, kind: Kind) -> Iterator[Measure]:
    """Yield a held-out metric: from the scores of the rows if available, else from the results, else from the log."""
    name, step = kind.metric, ""
    intervals: dict[Stage, Interval] = {}
    rows: dict[Stage, tuple[np.ndarray, np.ndarray]] = {}
    for stage in HELD_OUT:
        values, weights = run.column(stage, name), run.column(stage, "weight")
        if len(values) and not np.isnan(values if kind.share else values + weights).any():
            rows[stage] = values, weights
            intervals[stage] = rate_interval(values) if kind.share else mean_interval(values, weights)
        elif (metric := run.metric(f"eval_{name}", stage)) is not None:
            intervals[stage] = metric.interval
    if name == "rewards/accuracies" and run.starts_at_zero:
        intervals.pop("before", None)
        rows.pop("before", None)
    if kind.logged and "after" not in intervals and (logged := run.last(f"eval_{name}")) is not None:
        step = f" (step {logged[0]:,})"
        items = run.lines("generations/start.jsonl") if name == "generations/win_rate" else run.column("before", name)
        intervals["after"] = _share(logged[1], len(items) if kind.share else 0)
        if intervals["after"].low is None:  # without an interval, a change could not be judged
            intervals.pop("before", None)
    change = None
    if len(rows) == 2:
        (first, first_weights), (last, last_weights) = rows["before"], rows["after"]
        if kind.share:
            change = mean_interval(last - first)
        elif np.array_equal(first_weights, last_weights):
            change = mean_interval(last - first, first_weights)
    if "after" in intervals:
        yield Measure(kind, intervals["after"], intervals.get("before"), change, {"step": step})


def _share(value: float, n: int) -> Interval:
    """Return a share with its interval, given only the value and the number of items."""
    if not n:
        return Interval(value, None, None, 0, "")
    return replace(proportion_interval(round(value * n), n), value=value)
