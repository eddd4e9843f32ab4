"""What a report says of ``simpo compare``: win rates, what was compared, and what to know about the judges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from simpo.analysis.measure import Measure, literal, number
from simpo.analysis.reading import Run
from simpo.runs.results import Stage

# Facts of a comparison: metrics, what they are called, and whether they are shares of n rather than counts.
_OF_JUDGES = (
    ("ties", "Ties", True),
    ("without_verdict", "Without a verdict", False),
    ("conflicting_orders", "Another winner after a swap", False),
    ("first_shown_win_rate", "Answer shown first wins", True),
)


def contests(run: Run) -> Iterator[Measure]:
    """Of a comparison, every judge's win rate, as it is and at equal lengths."""
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
    """What A and B of a comparison are called, in brackets after the letter; empty where it is not known."""
    names = {side: str(run.settings.get(side, "")) for side in "ab"}
    short = {side: PurePath(name).name for side, name in names.items()}
    shown = short if short["a"] != short["b"] else names
    return {side: f" ({name})" if name else "" for side, name in shown.items()}


def compared(run: Run) -> Iterator[tuple[str, str]]:
    """What was compared, and what to know about the judges: ties, missing verdicts, and position bias."""
    yield from ((side.upper(), str(run.settings[side])) for side in "ab" if side in run.settings)
    stages: dict[str, Stage] = {"A": "after", "B": "before"}
    lengths = [(side, run.metric("response_characters", stage)) for side, stage in stages.items()]
    if text := ", ".join(f"{side} {found.value:,.0f}" for side, found in lengths if found and found.value is not None):
        yield "Mean length in characters", text
    for kind, label, share in _OF_JUDGES:
        found = [metric for metric in run.metrics if metric.name.partition("/")[0] == kind and metric.value is not None]
        for metric in found:
            judge = f" ({metric.name.partition('/')[2]})" if len(found) > 1 else ""
            of = "" if metric.n is None else f" of {metric.n:,}"
            yield label + judge, number(metric.interval, percent=True) if share else f"{metric.value:,.0f}{of}"


def cautions(run: Run) -> Iterator[str]:
    """What limits the verdicts of judges: position bias, and lengths that leave nothing else to measure."""
    for metric in run.metrics:
        kind, _, judge = metric.name.partition("/")
        if kind == "first_shown_win_rate" and metric.low is not None and metric.high is not None:
            place = "first" if metric.low > 0.5 else "second" if metric.high < 0.5 else None
            if place:
                yield (
                    f"The judge {judge} prefers the answer that is shown {place}. Every pair is judged in both orders, "
                    "so this costs certainty and favors neither side."
                )
        elif kind == "length_controlled_win_rate" and metric.value is None:
            yield f"There is no win rate at equal lengths by {judge}: the lengths alone determine its verdicts."
