"""lm-eval's results, and the differences between two models' with what they are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simpo.results import Metric, Stage
from simpo.statistics import mean_interval, share_bounds

_METHOD = "1.96 standard errors"
_SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "em", "f1", "mc1", "mc2", "pass@1")  # from 0 to 1


@dataclass(frozen=True)
class Score:
    """One figure of one task.

    Attributes:
        value: the figure.
        error: its standard error; None where lm-eval gives none.
        n: number of items; None for a group of tasks.
        items: the figure of every item by its number, where the figure is their mean; else empty.
    """

    value: float
    error: float | None
    n: int | None
    items: dict[str, float]


def read_scores(output: Mapping[str, Any]) -> dict[str, Score]:
    """The figures in what ``lm_eval.simple_evaluate`` returns, by ``task/metric``, ``task/metric:filter`` if filtered.

    Args:
        output: has ``results`` and, where they were asked for, ``samples`` and ``n-samples``.
    """
    found = {}
    for task, figures in output["results"].items():
        for key, value in figures.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = figures.get(f"{metric}_stderr,{rule}")
            items = _items(output.get("samples", {}).get(task, ()), metric, rule)
            if items and not math.isclose(np.mean(list(items.values())), value, abs_tol=1e-9):
                items = {}  # the figure is something else than their mean
            name = f"{task}/{metric}" if rule == "none" else f"{task}/{metric}:{rule}"
            n = output.get("n-samples", {}).get(task, {}).get("effective")
            found[name] = Score(float(value), float(error) if _is_number(error) else None, n, items)
    return found


def _items(samples: Sequence[Mapping[str, Any]], metric: str, rule: str) -> dict[str, float]:
    rows = [sample for sample in samples if sample.get("filter", "none") == rule]
    if not all(_is_number(row.get(metric)) or isinstance(row.get(metric), bool) for row in rows):
        return {}
    return {str(row["doc_id"]): float(row[metric]) for row in rows}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def score_metrics(scores: Mapping[str, Score], stage: Stage | None) -> list[Metric]:
    """Figures with intervals of 1.96 standard errors to either side, those of shares as Wilson's."""
    metrics = []
    for name, score in scores.items():
        is_share = name.rpartition("/")[2].partition(":")[0] in _SHARES
        around = share_bounds if is_share else lambda value, half: (value - half, value + half)
        low, high = (None, None) if score.error is None else around(score.value, 1.96 * score.error)
        method = None if score.error is None else _METHOD
        metrics.append(Metric(f"academic/{name}", score.value, stage, score.n, low, high, method))
    return metrics


def differences(before: Mapping[str, Score], after: Mapping[str, Score]) -> list[Metric]:
    """After minus before, of the figures that both have.

    Item by item where both have items, because two models find the same items hard; else from the two standard errors,
    which makes the interval wider than it had to be.
    """
    return [_difference(f"academic/{name}/difference", before[name], after[name]) for name in before if name in after]


def _difference(name: str, before: Score, after: Score) -> Metric:
    value = after.value - before.value
    if before.items and before.items.keys() == after.items.keys():
        found = mean_interval([after.items[key] - before.items[key] for key in before.items])
        return Metric(name, found.value, None, found.n, found.low, found.high, f"paired, {found.method}")
    if before.error is None or after.error is None:
        return Metric(name, value, None, after.n)
    half = 1.96 * math.hypot(before.error, after.error)
    return Metric(name, value, None, after.n, value - half, value + half, f"unpaired, {_METHOD}")
