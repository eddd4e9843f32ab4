"""Preference pairs from scored responses: the best of a prompt's responses against the worst."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpo.atomic import write_text
from simpo.errors import SimpoError
from simpo.runs.lines import read_lines

# Scores one response to a prompt (a text or messages); the higher, the better.
Scorer = Callable[[Any, str], float]


@dataclass
class PairReport:
    """What became of every prompt.

    Attributes:
        prompts: with responses.
        pairs: made of them, at most one a prompt.
        dropped: reason -> prompts that gave none.
    """

    prompts: int = 0
    pairs: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The report for people, a line each."""
        lines = [f"pairs: {self.pairs:,} of {self.prompts:,} prompts"]
        return lines + [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.items()]


def pair_responses(responses: Path, scorer: Scorer, output: Path) -> PairReport:
    """Write ``{prompt, chosen, rejected, chosen_score, rejected_score, id}`` rows for a file of sampled responses.

    Best against worst, as the paper pairs its own samples (section 4, after Llama-3-Instruct); of equal scores the
    first counts. A prompt whose responses are all alike, or all equally good, gives no pair, and is counted.

    Args:
        responses: what ``simpo sample`` left: ``responses.jsonl``.
        scorer: judges each response.
        output: the file of pairs, written whole or not at all.

    Raises:
        SimpoError: a file that cannot be read or written, or no pair at all.
    """
    report = PairReport()
    rows = []
    for record in read_lines(responses):
        report.prompts += 1
        scores = [scorer(record["prompt"], response) for response in record["responses"]]
        if not all(map(math.isfinite, scores)):
            raise SimpoError(f"{responses}: prompt {record['id']}: the scorer gave {scores}; it must give numbers")
        row = _best_and_worst(record, scores)
        if isinstance(row, str):
            report.dropped[row] += 1
        else:
            rows.append(row)
    report.pairs = len(rows)
    if not rows:
        raise SimpoError(f"{responses}: no pairs ({'; '.join(map(str.strip, report.lines()[1:])) or 'no prompts'})")
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return report


def _best_and_worst(record: Mapping[str, Any], scores: Sequence[float]) -> dict[str, Any] | str:
    """A pair, or why there is none."""
    responses: Sequence[str] = record["responses"]
    if len(set(responses)) < 2:
        return "its responses are all the same"
    best, worst = _first(scores, max(scores)), _first(scores, min(scores))
    if scores[best] == scores[worst]:
        return "its responses are all equally good"
    return {
        "prompt": record["prompt"],
        "chosen": responses[best],
        "rejected": responses[worst],
        "chosen_score": scores[best],
        "rejected_score": scores[worst],
        "id": record["id"],
    }


def _first(scores: Iterable[float], value: float) -> int:
    return next(index for index, score in enumerate(scores) if score == value)
