"""Judgments -> scores by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simpo.evaluation.arena_hard.files import Answer, Judgment
from simpo.evaluation.arena_hard.scores import (
    Style,
    Version,
    battles,
    score,
    score_over_prompts,
    style_controlled,
    style_differences,
    style_of,
)
from simpo.runs.log import Log
from simpo.runs.results import Metric

Answers = Mapping[str, Answer]  # by uid


def figures(judgments: Sequence[Judgment], ours: Answers, theirs: Answers, version: Version, log: Log) -> list[Metric]:
    """Scores by category in percent, as the benchmark has them, over prompts, and in the baseline's style."""
    metrics = []
    for category in dict.fromkeys(judgment.question.category for judgment in judgments):
        found = [judgment for judgment in judgments if judgment.question.category == category]
        counted = [(judgment, worths) for judgment in found if (worths := battles(*judgment.verdicts, version))]
        if counted:
            metrics += _category(category, counted, ours, theirs, version)
        else:
            metrics.append(Metric(f"arena_hard/{category}/score", None, n=0))
        missing = sum(verdict is None for judgment in found for verdict in judgment.verdicts)
        metrics.append(Metric(f"arena_hard/{category}/games_without_verdict", missing, n=2 * len(found)))
        if missing:
            left_out = len(found) - len(counted)
            log(f"note: {category}: {missing} games have no verdict; {left_out} prompts are left out for that")
    return metrics


def _category(
    category: str,
    counted: Sequence[tuple[Judgment, list[float]]],
    ours: Answers,
    theirs: Answers,
    version: Version,
) -> list[Metric]:
    prompts = [worths for _, worths in counted]
    uids = [judgment.question.uid for judgment, worths in counted for _ in worths]
    known = all(answers[uid].tokens is not None for uid in uids for answers in (ours, theirs))
    sides = ([_style(answers[uid], known) for uid in uids] for answers in (ours, theirs))
    worths = np.concatenate([np.asarray(found, dtype=np.float64) for found in prompts])
    styled = style_controlled(np.zeros(len(uids), dtype=np.int64), worths, style_differences(*sides))
    intervals = {"score": score(prompts, version), "score_over_prompts": score_over_prompts(prompts)}
    lengths = [len(ours[judgment.question.uid].text) for judgment, _ in counted]
    return [
        *(Metric.of(f"arena_hard/{category}/{name}", found) for name, found in intervals.items()),
        Metric(f"arena_hard/{category}/score_in_baseline_style", float(styled.at_equal[0]), n=len(prompts)),
        Metric(f"arena_hard/{category}/avg_length", float(np.mean(lengths)), n=len(lengths)),
    ]


def _style(answer: Answer, tokens: bool) -> Style:
    """With the length in tokens where every answer has it; else all in characters, so that they can be compared."""
    return style_of(answer.text, answer.tokens if tokens else None)
