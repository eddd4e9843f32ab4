"""The answer first: what was measured before and after, by how much it changed, and how certain that is.

``page/headline.yaml`` has the kinds of measurements and their words.
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
    """A kind of measurement: a row of ``headline.yaml``, which explains the fields."""

    label: str
    sentence: str
    alone: str = ""
    metric: str = ""
    commands: tuple[str, ...] = ()
    even: float | None = None
    verdicts: tuple[str, str, str] = ("It got better", "It got worse", "No clear change")
    share: bool = True  # whether it is a share, shown in percent
    smaller_is_better: bool = False  # as for a loss
    logged: bool = False  # whether the value that was logged last stands in where there is no other

    def fits(self, name: str, command: str, compared: bool) -> bool:
        """Whether this kind covers the metric; ``compared`` tells whether the metric has a value before training."""
        of_run = not self.commands or command in self.commands
        return of_run and compared == ("{before}" in self.sentence) and re.fullmatch(self.metric, name) is not None


_ROWS = yaml.safe_load((Path(__file__).parent / "page/headline.yaml").read_text(encoding="utf-8"))
_RESULTS = [Kind(**row) for row in _ROWS["results"]]
_HELD_OUT = [Kind(**row) for row in _ROWS["held_out"]]


@dataclass(frozen=True)
class Measure:
    """One measurement of a run."""

    kind: Kind
    after: Interval  # under the trained model
    before: Interval | None  # under the start model; None where that does not apply
    change: Interval | None  # from before to after on the same rows; None where it is not known row by row
    names: Mapping[str, str]  # what its words have in braces, apart from numbers

    @property
    def even(self) -> float | None:
        """The value that means no difference, of measurements without ``before``."""
        return self.kind.even if self.before is None else None

    @property
    def direction(self) -> Direction:
        """Better or worse where 95% intervals exclude "no difference", else unclear."""
        found, low, high = self.after, self.even, self.even
        if self.change is not None:
            found, low, high = self.change, 0.0, 0.0
        elif self.before is not None:  # not paired: intervals that do not overlap differ
            low, high = self.before.low, self.before.high
        if low is None or high is None:
            return "unknown" if self.before is None else "unclear"
        if found.low is None or found.high is None or (found.low <= high and found.high >= low):
            return "unclear"
        return "better" if (found.low > high) is not self.kind.smaller_is_better else "worse"

    @property
    def label(self) -> str:
        """The name of the measurement as the report shows it."""
        return self.kind.label.format(**self.names)

    @property
    def verdict(self) -> str:
        """The wording of :attr:`direction`, which must not be ``"unknown"``."""
        words = dict(zip(("better", "worse", "unclear"), self.kind.verdicts, strict=True))
        return words[self.direction].format(**self.names)

    @property
    def statement(self) -> str:
        """The sentence about this measurement in the headline."""
        sentence = self.kind.sentence if self.before else self.kind.alone or self.kind.sentence
        values = {"before": self.text(self.before), "after": self.text(self.after), "n": f"{self.after.n:,}"}
        return sentence.format(**values, **self.names) + (f" ({self.change_text})" if self.change else "")

    @property
    def change_text(self) -> str:
        """The change with its interval; empty where it is not known."""
        unit = " points" if self.kind.share else ""
        return "" if self.change is None else number(self.change, percent=self.kind.share, sign=True, unit=unit)

    def text(self, found: Interval | None) -> str:
        """A value with its interval."""
        return "" if found is None else number(found, percent=self.kind.share)

    @property
    def axis(self) -> tuple[float, float]:
        """The ends of an axis for all values and bounds; shares have the whole one, from 0 to 1."""
        found = [end for one in (self.before, self.after) if one for end in (one.value, one.low, one.high)]
        ends = [end for end in (*found, self.even) if end is not None]
        space = 0.15 * (max(ends) - min(ends)) or 1.0
        return (0.0, 1.0) if self.kind.share else (min(ends) - space, max(ends) + space)


def number(found: Interval, *, percent: bool = False, sign: bool = False, unit: str = "%") -> str:
    """A value and its interval as text: ``63.7% [61.3, 66.1]``."""

    def shown(value: float) -> str:
        form = ".1f" if percent else ",.0f" if abs(value) >= 10_000 else ".4g"
        return f"{(100 if percent else 1) * value:{'+' if sign else ''}{form}}".replace("-", "\N{MINUS SIGN}")

    bounds = "" if found.low is None or found.high is None else f" [{shown(found.low)}, {shown(found.high)}]"
    return f"{shown(found.value)}{unit if percent else ''}{bounds}"


# ---- What is measured.

_OF_BEST = ("best/eval_rewards/accuracies", "best/eval_generations/win_rate")  # a trial's own results have them as well


def measurements(run: Run) -> list[Measure]:
    """Everything that tells whether the model of a run got better, the most telling first."""
    trained = run.trained
    kinds = [kind for kind in _HELD_OUT if not kind.commands or trained.record.command in kind.commands]
    return [*_in_results(run), *(one for kind in kinds for one in _held_out(trained, kind))]


def deciding(measures: Sequence[Measure]) -> Measure | None:
    """The measurement that decides whether a run made a model better: the first that can be judged."""
    return next((one for one in measures if one.direction != "unknown"), None)


def _in_results(run: Run) -> Iterator[Measure]:
    """The measurements in ``results.json``, in the order of the file; for a loop, those of its last round."""
    rounds = [int(one.name[6:].partition("/")[0]) for one in run.metrics if one.name.startswith("round-")]
    models = _model_names(run)
    for metric in run.metrics:
        name = metric.name.removeprefix(f"round-{max(rounds)}/") if rounds else metric.name
        before = run.metric(metric.name, "before")
        kind = next((one for one in _RESULTS if one.fits(name, run.record.command, before is not None)), None)
        if kind is None or metric.value is None or metric.stage == "before":
            continue
        if name in _OF_BEST and run.trained is not run:
            continue
        judge = name.partition("/")[2]
        ties = run.metric(f"ties/{judge}")
        names = models | {
            "name": name.removeprefix("best/"),
            "judged": f", judged by {judge}" if judge else "",
            "ties": f" ({100 * ties.value:.1f}% are ties and count half)" if ties and ties.value else "",
        }
        paired = run.metric(f"{name}/difference") or run.metric(f"{name.rpartition('/')[0]}/difference")
        start, change = (before.interval, paired.interval if paired else None) if before else (None, None)
        yield Measure(kind, metric.interval, start, change, names)


def _model_names(run: Run) -> dict[str, str]:
    """The names of a comparison's models by side, in parentheses, as short as they can be told apart."""
    names = {side: str(run.settings.get(side, "")) for side in "ab"}
    short = {side: PurePath(name).name for side, name in names.items()}
    return {side: f" ({name})" if name else "" for side, name in (short if short["a"] != short["b"] else names).items()}


def _held_out(run: Run, kind: Kind) -> Iterator[Measure]:
    """A metric of held-out rows: row by row where the files are there, else of the results, else as logged last."""
    name, step = kind.metric, ""
    found: dict[Stage, Interval] = {}
    rows: dict[Stage, tuple[np.ndarray, np.ndarray]] = {}
    for stage in HELD_OUT:
        values, weights = run.column(stage, name), run.column(stage, "weight")
        if len(values) and not np.isnan(values if kind.share else values + weights).any():
            rows[stage] = values, weights
            found[stage] = rate_interval(values) if kind.share else mean_interval(values, weights)
        elif (metric := run.metric(f"eval_{name}", stage)) is not None:
            found[stage] = metric.interval
    if name == "rewards/accuracies" and run.starts_at_zero:
        found.pop("before", None)
        rows.pop("before", None)
    if kind.logged and "after" not in found and (logged := run.last(f"eval_{name}")) is not None:
        step = f" (step {logged[0]:,})"
        of = run.lines("generations/start.jsonl") if name == "generations/win_rate" else run.column("before", name)
        found["after"] = _share(logged[1], len(of) if kind.share else 0)
        if found["after"].low is None:  # nothing tells how certain a change would be
            found.pop("before", None)
    change = None
    if len(rows) == 2:
        (first, weights), (last, same) = rows["before"], rows["after"]
        if kind.share:
            change = mean_interval(last - first)
        elif np.array_equal(weights, same):
            change = mean_interval(last - first, weights)
    if "after" in found:
        yield Measure(kind, found["after"], found.get("before"), change, {"step": step})


def _share(value: float, n: int) -> Interval:
    """A share of which only the value and the number of items are known."""
    if not n:
        return Interval(value, None, None, 0, "")
    return replace(proportion_interval(round(value * n), n), value=value)
