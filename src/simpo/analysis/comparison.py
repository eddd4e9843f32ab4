"""What a report says about a run of ``simpo compare``: win rates, the two sides, and how far to trust the judges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from simpo.analysis.measure import Measure, literal, number
from simpo.analysis.reading import Run
from simpo.runs.results import Stage

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
