"""A measurement of a run: its value before and after training, the change, and whether that change is significant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo.statistics import Interval

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
