"""The answer first: what was measured before and after, by how much it changed, and how certain that is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import numpy as np

from simpo.analysis.reading import Run
from simpo.runs.results import Stage
from simpo.statistics import Interval, mean_interval, proportion_interval, rate_interval

Direction = Literal["better", "worse", "unclear", "unknown"]


@dataclass(frozen=True)
class Measure:
    """One measurement of a run."""

    label: str  # what was measured
    sentence: str  # its part of the headline, with `{before}`, `{after}` and `{n}`
    after: Interval  # under the trained model
    before: Interval | None = None  # under the start model; None where that does not apply
    change: Interval | None = None  # from before to after on the same rows; None where it is not known row by row
    even: float | None = None  # the value that means no difference, for measurements without `before`
    # The headline's words for better, for worse, and for a change that may be due to chance.
    verdicts: tuple[str, str, str] = ("It got better", "It got worse", "No clear change")
    share: bool = True  # whether it is a share, shown in percent
    smaller_is_better: bool = False  # as for a loss

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
        return "better" if (found.low > high) is not self.smaller_is_better else "worse"

    @property
    def words(self) -> str:
        """The verdict."""
        return dict(zip(("better", "worse", "unclear"), self.verdicts, strict=True))[self.direction]

    def text(self, found: Interval | None) -> str:
        """A value with its interval."""
        return "" if found is None else number(found, percent=self.share)

    @property
    def change_text(self) -> str:
        """The change with its interval; empty where it is not known."""
        unit = " points" if self.share else ""
        return "" if self.change is None else number(self.change, percent=self.share, sign=True, unit=unit)

    @property
    def statement(self) -> str:
        """Its part of the headline."""
        values = {"after": self.text(self.after), "before": self.text(self.before), "n": f"{self.after.n:,}"}
        return self.sentence.format(**values) + (f" ({self.change_text})" if self.change else "")


def literal(name: str) -> str:
    """``name`` with its braces escaped, as part of :attr:`Measure.sentence`."""
    return name.replace("{", "{{").replace("}", "}}")


def number(found: Interval, *, percent: bool = False, sign: bool = False, unit: str = "%") -> str:
    """A value and its interval as text: ``63.7% [61.3, 66.1]``."""

    def shown(value: float) -> str:
        form = ".1f" if percent else ",.0f" if abs(value) >= 10_000 else ".4g"
        return f"{(100 if percent else 1) * value:{'+' if sign else ''}{form}}".replace("-", "\N{MINUS SIGN}")

    bounds = "" if found.low is None or found.high is None else f" [{shown(found.low)}, {shown(found.high)}]"
    return f"{shown(found.value)}{unit if percent else ''}{bounds}"


# ---- Runs of `simpo compare`.

# Metrics of judges: the name before the judge's own, the label, and whether the value is a share (else a count of n).
_OF_JUDGES = (
    ("ties", "Ties", True),
    ("without_verdict", "Without a verdict", False),
    ("conflicting_orders", "Different winner after a swap", False),
    ("first_shown_win_rate", "Answer shown first wins", True),
)


def contests(run: Run) -> Iterator[Measure]:
    """Every judge's win rate of A against B, raw and controlled for length."""
    a, b = _names_of(run).values()
    verdicts = (f"A{a} is better", f"B{b} is better", "No clear difference")
    for metric in run.metrics:
        kind, _, judge = metric.name.partition("/")
        if metric.value is None or kind not in ("win_rate", "length_controlled_win_rate"):
            continue
        label, judged = "Win rate of A against B", f", judged by {judge}" if judge else ""
        text = "A's answers win {after} of comparisons with B's to {n} prompts" + literal(judged)
        ties = run.metric(f"ties/{judge}")
        if ties and ties.value:
            text += f" ({100 * ties.value:.1f}% are ties and count half)"
        if kind != "win_rate":
            label, text = f"{label} at equal lengths", "if both answers were equally long, A's would win {after}"
        yield Measure(label + judged, text, metric.interval, even=0.5, verdicts=verdicts)


def _names_of(run: Run) -> dict[str, str]:
    """The models' names in parentheses by side, to be put after the letters A and B; empty where they are not known."""
    names = {side: str(run.settings.get(side, "")) for side in "ab"}
    short = {side: PurePath(name).name for side, name in names.items()}
    shown = short if short["a"] != short["b"] else names
    return {side: f" ({name})" if name else "" for side, name in shown.items()}


def compared(run: Run) -> Iterator[tuple[str, str]]:
    """Labels and texts: the two sides, the mean lengths of their answers, ties, missing verdicts, and position bias."""
    yield from ((side.upper(), str(run.settings[side])) for side in "ab" if side in run.settings)
    stages: dict[str, Stage] = {"A": "after", "B": "before"}
    lengths = [(side, run.metric("response_characters", stage)) for side, stage in stages.items()]
    if text := ", ".join(f"{side} {found.value:,.0f}" for side, found in lengths if found and found.value is not None):
        yield "Mean length in characters", text
    for kind, label, share in _OF_JUDGES:
        found = [metric for metric in run.metrics if metric.name.partition("/")[0] == kind and metric.value is not None]
        for metric in found:
            judge = f" ({metric.name.partition('/')[2]})" if len(found) > 1 else ""
            total = "" if metric.n is None else f" of {metric.n:,}"
            yield label + judge, number(metric.interval, percent=True) if share else f"{metric.value:,.0f}{total}"


def cautions(run: Run) -> Iterator[str]:
    """Sentences about what limits the verdicts: position bias, and lengths that determine them completely."""
    for metric in run.metrics:
        kind, _, judge = metric.name.partition("/")
        if kind == "first_shown_win_rate" and metric.low is not None and metric.high is not None:
            place = "first" if metric.low > 0.5 else "second" if metric.high < 0.5 else None
            if place:
                yield (
                    f"The judge {judge} prefers the answer that is shown {place}. Every pair is judged in both orders, "
                    "so this favors neither side, but makes the win rate less certain."
                )
        elif kind == "length_controlled_win_rate" and metric.value is None:
            yield f"The judge {judge} has no win rate at equal lengths: the lengths alone determine its verdicts."


# ---- The headline of a run.

_ACCURACY, _AREA, _WIN_RATE = "eval_rewards/accuracies", "eval_rewards/auc", "eval_generations/win_rate"
_BENCHMARKS = ("alpaca_eval/lc_", "alpaca_eval/win", "arena_hard", "mt_bench/average", "gsm8k")
_PERCENT = ("/win_rate", "/lc_win_rate")  # of benchmarks: in percent already


@dataclass(frozen=True)
class Headline:
    """The verdict on a run in a few words, how certain it is, and the sentence that it rests on."""

    direction: Direction
    words: str
    certainty: str
    sentence: str
    measures: list[Measure]

    @classmethod
    def of(cls, run: Run) -> Headline:
        """The headline of a run, finished or not; the first measurement that can be judged decides."""
        measures = list(measurements(run))
        sentence = "; ".join(one.statement for one in measures[:3])
        count, best = (run.metric(name) for name in ("trials/finished", "best/trial"))
        if count and best:  # of a sweep
            sentence = f"of {count.value:,.0f} finished trials, {best.value:03.0f} is the best: {sentence}"
        sentence = f"So far, {sentence}" if sentence and not run.finished else sentence
        if not sentence:
            sentence = (
                "Nothing was measured that tells whether the model got better" if run.finished else "No result yet"
            )
            if run.record.command in ("train", "sft", "reward", "online") and not run.settings.get("eval_dataset_name"):
                sentence += "; held-out rows would tell (eval_dataset_name)"
        sentence = f"{sentence[0].upper()}{sentence[1:]}."
        deciding = next((one for one in measures if one.direction != "unknown"), None)
        if deciding is None:
            words = "Measured, not compared" if measures else "Not measured" if run.finished else "Not measured yet"
            return cls("unknown", words, "", sentence, measures)
        includes = "includes" if deciding.direction == "unclear" else "excludes"
        certainty = f"{deciding.label}: the 95% interval {includes} no difference."
        words = deciding.words if best is None else re.sub("^It ", "The best trial ", deciding.words)
        return cls(deciding.direction, words, certainty, sentence, measures)


# ---- What is measured, the most telling first.


def measurements(run: Run) -> Iterator[Measure]:
    """Everything that tells whether the model of a run got better, the most telling first."""
    trained = trained_run(run)
    if run.record.command == "compare":
        yield from contests(run)
    else:
        yield from _win_rates(run)
    yield from _right_answers(run)
    yield from _generated(trained)
    yield from _rankings(trained)
    yield from _losses(trained)
    if run.record.command == "evaluate":
        yield from _benchmarks(run)
    if run.record.command == "sweep":
        yield from _ranked_by(run)


def _benchmarks(run: Run) -> Iterator[Measure]:
    for metric in run.metrics:
        difference = metric.name.endswith("/difference")  # between before and after, which the accuracies show
        if metric.stage is None and metric.low is not None and metric.name.startswith(_BENCHMARKS) and not difference:
            even = 50.0 if metric.name.endswith(_PERCENT) else None
            yield Measure(metric.name, literal(metric.name) + " is {after}", metric.interval, even=even, share=False)


def _ranked_by(run: Run) -> Iterator[Measure]:
    """The metric that the trials of a sweep are ranked by, unless the best trial's own measurements include it."""
    for metric in run.metrics:
        name = metric.name.removeprefix("best/")
        included = name in (_ACCURACY, _WIN_RATE) and trained_run(run) is not run
        if name not in (metric.name, "trial") and metric.value is not None and not included:
            share = name in (_ACCURACY, _WIN_RATE)
            yield Measure(f"{name} of the best trial", f"{literal(name)} is {{after}}", metric.interval, share=share)


def trained_run(run: Run) -> Run:
    """The run itself, or the part of it that trained the model in question."""
    name = {"demo": "simpo"}.get(run.record.command)
    if run.record.command == "loop":
        name = next((name for name in reversed(run.parts) if name.endswith("/model")), None)
    elif run.record.command == "sweep" and (best := run.metric("best/trial")) is not None:
        name = f"trials/{best.value:03.0f}"
    return run.parts.get(name or "", run)


def _win_rates(run: Run) -> Iterator[Measure]:
    """Win rates in the results: over all judges, and of a loop in its last round."""
    rounds = [int(one.name[6:].partition("/")[0]) for one in run.metrics if one.name.startswith("round-")]
    prefix = f"round-{max(rounds)}/" if rounds else ""
    for metric in run.metrics:
        name = metric.name.removeprefix(prefix)
        if metric.value is not None and name.partition("/")[0] == "win_rate":
            judge = f", judged by {name.partition('/')[2]}" if "/" in name else ""
            text = f"its answers win {{after}} of comparisons with the start model's to {{n}} prompts{literal(judge)}"
            yield Measure(f"Win rate against the start model's answers{judge}", text, metric.interval, even=0.5)


def _right_answers(run: Run) -> Iterator[Measure]:
    """Shares of right answers before and after, with their difference where it was measured pair by pair."""
    for metric in run.metrics:
        before, found = run.metric(metric.name, "before"), run.metric(metric.name, "after")
        if metric is found and before and metric.name.endswith(("correct", "/acc", "/accuracy", "/exact_match")):
            label = "Correct answers" if metric.name == "correct" else metric.name
            head = metric.name.rpartition("/")[0]
            paired = run.metric(f"{metric.name}/difference") or run.metric(f"{head}/difference")
            text = f"{literal(label[0].lower() + label[1:])} went from {{before}} to {{after}}"
            yield Measure(label, text, found.interval, before.interval, paired.interval if paired else None)


def _generated(run: Run) -> Iterator[Measure]:
    """The win rate of answers during training, at the last evaluation."""
    if (logged := run.last(_WIN_RATE)) is not None:
        n = len(run.lines("generations/start.jsonl"))
        text = f"its answers win {{after}} of {{n}} comparisons with the start model's (step {logged[0]:,})"
        yield Measure("Win rate against the start model's answers", text, _logged(logged[1], n), even=0.5)


def _rankings(run: Run) -> Iterator[Measure]:
    """Which of two held-out responses has the higher reward: row by row where the files are there, or as logged."""
    verdicts = ("It ranks pairs better", "It ranks pairs worse", "No clear change")
    before, after = (run.column(stage, "rewards/accuracies") for stage in ("before", "after"))
    logged = run.last(_ACCURACY)
    start = rate_interval(before) if len(before) and not np.isnan(before).any() and not run.starts_at_zero else None
    text = "reward accuracy on {n} held-out pairs " + (
        "went from {before} to {after}" if start else "is {after}, where 50% is chance"
    )
    if len(after) and not np.isnan(after).any():
        change = mean_interval(after - before) if start else None
        found = rate_interval(after)
    elif (metric := run.metric(_ACCURACY, "after")) is not None:
        found, change = metric.interval, None
    elif logged is not None:
        found, change, text = _logged(logged[1], len(before)), None, f"{text} (step {logged[0]:,})"
    else:
        found = None
    if found is not None:
        yield Measure("Reward accuracy", text, found, start, change, 0.5, verdicts)
    if (area := run.metric(_AREA, "after")) is not None:
        first = run.metric(_AREA, "before")
        text = "the area under the ROC curve on {n} held-out responses " + (
            "went from {before} to {after}" if first else "is {after}"
        )
        before_auc = first.interval if first else None
        yield Measure("Area under the ROC curve", text, area.interval, before_auc, even=0.5, share=False)


def _losses(run: Run) -> Iterator[Measure]:
    """Held-out losses of supervised fine-tuning; those of preference objectives do not tell how good a model is."""
    if run.record.command != "sft":
        return
    verdicts = ("It predicts answers better", "It predicts answers worse", "No clear change")
    stages = run.metric("eval_loss", "before"), run.metric("eval_loss", "after")
    if stages[0] is not None and stages[1] is not None:
        losses, weights = ([run.column(stage, name) for stage in ("before", "after")] for name in ("loss", "weight"))
        same_rows = len(losses[0]) > 0 and np.array_equal(weights[0], weights[1])
        change = mean_interval(losses[1] - losses[0], weights[0]) if same_rows else None
        text = "the loss on {n} held-out conversations went from {before} to {after} nats per token"
        one, other = (metric.interval for metric in stages if metric is not None)
        yield Measure("Held-out loss", text, other, one, change, None, verdicts, share=False, smaller_is_better=True)
    elif (logged := run.last("eval_loss")) is not None:
        text = f"the loss on held-out conversations is {{after}} nats per token (step {logged[0]:,})"
        yield Measure("Held-out loss", text, Interval(logged[1], None, None, 0, ""), share=False)


def _logged(value: float, n: int) -> Interval:
    """A share of which only the value and the number of items are known."""
    if not n:
        return Interval(value, None, None, 0, "")
    bounds = proportion_interval(round(value * n), n)
    return Interval(value, bounds.low, bounds.high, n, bounds.method)


# ---- Several runs.


def compare_runs(runs: Sequence[Run]) -> Iterator[str]:
    """Sentences on what can and cannot be concluded from several runs side by side."""
    trained = [trained_run(run) for run in runs]
    kinds = sorted({run.record.command for run in runs})
    if len(kinds) > 1:
        yield f"These runs are of different kinds ({', '.join(kinds)}): only what they share can be compared."
    if len({one.record.identity.get("data/eval") for one in trained}) > 1:
        yield "These runs were evaluated on different held-out rows: their held-out numbers cannot be compared."
        return
    if len({one.settings.get("objective") for one in trained}) > 1:
        yield "These runs have different objectives: losses, rewards and margins are on different scales."
    found = [(run, one.column("after", "rewards/accuracies")) for run, one in zip(runs, trained, strict=True)]
    found = [(run, values) for run, values in found if len(values) and not np.isnan(values).any()]
    if len(found) > 1 and len({len(values) for _, values in found}) == 1:
        (best, first), (second, other), *_ = sorted(found, key=lambda pair: -float(pair[1].mean()))
        change = mean_interval(first - other)
        clear = change.low is not None and change.low > 0
        text = number(change, percent=True, sign=True, unit=" points")
        how = "a clear difference" if clear else "no clear difference"
        yield f"Highest held-out accuracy: {best.name}, {text} compared with {second.name}, {how}."


def facts_of(run: Run) -> list[tuple[str, str]]:
    """Labels and texts: time, steps, tokens and peak memory; for a comparison, first what was compared."""
    trained = trained_run(run)
    part = {"sweep": " (best trial)", "loop": " (last round)"}.get(run.record.command, "")
    steps, tokens = (trained.metric(f"train/{name}") for name in ("steps", "tokens"))
    memory = run.record.peak_memory or trained.record.peak_memory or {}
    minutes, seconds = divmod(round(run.seconds), 60)
    last = f"{trained.logs[-1].get('step') or 0:,}" if trained.logs else ""
    facts = {
        "Time": f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s",
        f"Steps{part}": f"{steps.value:,.0f}" if steps else last,
        f"Tokens trained on{part}": f"{tokens.value:,.0f}" if tokens else "",
        "Peak memory": ", ".join(f"{size / 2**30:.2f} GiB ({place})" for place, size in memory.items()),
    }
    known = [(name, text or "unknown") for name, text in facts.items() if text or trained.logs]
    return [*compared(run), *known] if run.record.command == "compare" else known
