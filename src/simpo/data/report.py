"""What became of every row of a data set: used, skipped, dropped or cut, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

_EXAMPLES = 3
# Of what a row became after the first: it is no row of its own.
_PART = "part: "


@dataclass
class DataReport:
    """Counts of one data set.

    Attributes:
        label: what the data set is for, e.g. ``"train"``.
        rows: rows found.
        used: rows that are kept.
        bad: reason -> rows that could not be used.
        dropped: reason -> rows that could be used and are not: they do not fit, say.
        cut: what -> rows that were cut and are used.
        split: why -> rows that became several.
        ignored: what -> rows that are used without it.
        examples: reason -> where its first few rows come from.
        notices: remarks that are no counts.
        noun: what the rows become, in the plural.
    """

    label: str
    rows: int
    used: int
    bad: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    split: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    noun: str = "comparisons"

    @classmethod
    def of(cls, label: str, statuses: Iterable[tuple[str, list[str]]], noun: str = "comparisons") -> Self:
        """Count statuses.

        Args:
            label: of the data set.
            statuses: for each row where it comes from and what happened, as ``"bad: reason"``,
                ``"dropped: reason"``, ``"cut: what"``, ``"split: why"`` or ``"ignored: what"``; an empty list for a row
                that is used as it is. Of a row that became several, each has an entry, all but the first of them
                with ``"part: "``.
            noun: what the rows become, in the plural.
        """
        report = cls(label, rows=0, used=0, noun=noun)
        for where, entries in statuses:
            report.rows += not any(entry.startswith(_PART) for entry in entries)
            report.used += is_used(entries)
            for entry in entries:
                report._count(entry, where)
        return report

    @property
    def _counts(self) -> dict[str, dict[str, int]]:
        return {kind: getattr(self, kind) for kind in ("bad", "dropped", "cut", "split", "ignored")}

    def drop(self, reason: str, where: str) -> None:
        """Count a row that was used so far as dropped."""
        self.used -= 1
        self._count(f"dropped: {reason}", where)

    def _count(self, entry: str, where: str) -> None:
        kind, _, reason = entry.partition(": ")
        if entry.startswith(_PART):
            return
        counts = self._counts[kind]
        counts[reason] = counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(where)

    def lines(self) -> list[str]:
        """The report for people, a line each."""
        lines = [f"{self.label}: {self.used:,} {self.noun} of {self.rows:,} rows"]
        for kind, counts in self._counts.items():
            shown = "skipped" if kind == "bad" else kind
            lines += [self._line(shown, reason, count) for reason, count in counts.items()]
        return lines + [f"  note: {notice}" for notice in self.notices]

    def _line(self, kind: str, reason: str, count: int) -> str:
        shown = self.examples[reason]
        more = ", ..." if count > len(shown) else ""
        return f"  {kind} {count:,}: {reason} ({', '.join(shown)}{more})"

    def metrics(self) -> list[tuple[str, float]]:
        """Names and values for the results: totals, and one for each reason."""
        metrics = Counter({"rows": self.rows, "used": self.used})
        for kind, counts in self._counts.items():
            metrics[kind] = sum(counts.values())
            for reason, count in counts.items():
                metrics[f"{kind}/{_slug(reason)}"] += count
        return [(f"data/{self.label}/{name}", value) for name, value in metrics.items()]


def is_used(entries: list[str]) -> bool:
    """Whether a row with these status entries is kept."""
    return not any(entry.startswith(("bad: ", "dropped: ")) for entry in entries)


def is_part(entry: str) -> bool:
    """Whether a status entry says that a row became several."""
    return entry.startswith((_PART, "split: "))


def _slug(reason: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", reason.lower()).strip("_")
