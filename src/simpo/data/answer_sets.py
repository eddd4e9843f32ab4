"""Several answers to one prompt: how different they are, how their scores spread, and what length has to do with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from datasets import Dataset

from simpo.data.formats import is_number
from simpo.data.rows import Row
from simpo.data.shapes import canonical_rows, first_canonical
from simpo.results import Metric
from simpo.statistics import mean_interval, share_interval

PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}
_WORDS = 2  # of an n-gram
_SHARES = ("distinct_answers", "distinct_2", "overlap", "longer_wins")


@dataclass(frozen=True)
class AnswerSet:
    """The answers to one prompt.

    Attributes:
        responses: their texts.
        scores: one number each, the higher the better; None for an answer without one, and for all if there are none.
    """

    responses: Sequence[str]
    scores: Sequence[float | None] | None = None

    def scored(self) -> list[tuple[str, float]]:
        """The answers that have a score, with it."""
        pairs = zip(self.responses, self.scores or (), strict=False)
        return [(text, score) for text, score in pairs if score is not None]


def read_answer_sets(dataset: Dataset) -> list[AnswerSet]:
    """The answers of every row that has ``responses``, K-wise data or sampled; other rows are left out.

    Args:
        dataset: rows as :func:`simpo.data.sources.load_rows` gives them.
    """
    rows = canonical_rows(dataset)
    return [_answers(row) for row in rows if isinstance(row.get("responses"), list) and row["responses"]]


def is_sampled(dataset: Dataset) -> bool:
    """Whether the rows are answers as ``simpo sample`` and ``simpo annotate`` leave them, not comparisons yet."""
    row = first_canonical(dataset)
    return "responses" in row and ("scores" not in row or "finished" in row)


def distinct_ngrams(responses: Sequence[str]) -> float | None:
    """Share of different ones among all word bigrams of some answers; None where no answer has two words.

    Source: Li, Galley, Brockett, Gao and Dolan 2016 (arXiv 1510.03055), distinct-2, over the answers to one prompt.
    """
    found = [gram for text in responses for gram in _ngrams(text)]
    return len(set(found)) / len(found) if found else None


def mean_overlap(responses: Sequence[str]) -> float | None:
    """Mean over all pairs of answers of the share of word bigrams that both have (Jaccard); None for one answer.

    Two answers without bigrams overlap wholly if they are the same, else not at all.
    """
    shares = [_overlap(a, b) for a, b in combinations(responses, 2)]
    return float(np.mean(shares)) if shares else None


def longer_wins(answers: AnswerSet) -> float | None:
    """Share of the pairs that differ in score and in characters whose longer answer has the higher score.

    None where no pair differs in both.
    """
    found = [
        (len(a) > len(b)) == (x > y)
        for (a, x), (b, y) in combinations(answers.scored(), 2)
        if len(a) != len(b) and x != y
    ]
    return sum(found) / len(found) if found else None


def diversity_metrics(prefix: str, sets: Sequence[AnswerSet]) -> list[Metric]:
    """How different the answers to a prompt are, means over prompts; a prompt of which a figure is None is left out."""
    lengths = [float(np.mean([len(text) for text in found.responses])) for found in sets]
    figures = {
        "characters": lengths,
        "distinct_answers": [len(set(found.responses)) / len(found.responses) for found in sets],
        "distinct_2": _known(distinct_ngrams(found.responses) for found in sets),
        "overlap": _known(mean_overlap(found.responses) for found in sets),
    }
    counts = [Metric(f"{prefix}/prompts", len(sets)), Metric(f"{prefix}/answers", sum(len(x.responses) for x in sets))]
    return counts + _intervals(prefix, figures)


def _intervals(prefix: str, figures: Mapping[str, Sequence[float]]) -> list[Metric]:
    """Means over prompts, of figures that some prompt has."""
    metrics = []
    for name, values in figures.items():
        if values:
            found = (share_interval if name in _SHARES else mean_interval)(values)
            metrics.append(Metric(f"{prefix}/{name}", found.value, None, found.n, found.low, found.high, found.method))
    return metrics


def score_metrics(prefix: str, sets: Sequence[AnswerSet]) -> list[Metric]:
    """How scores are distributed, over answers and over prompts, and how often the longer answer has the higher one."""
    scored = [[score for _, score in found.scored()] for found in sets]
    every = [score for scores in scored for score in scores]
    metrics = [Metric(f"{prefix}/unscored", sum(len(found.responses) for found in sets) - len(every))]
    if not every:
        return metrics
    some = [scores for scores in scored if scores]
    figures = {
        "score": [float(np.mean(scores)) for scores in some],
        "best_score": [max(scores) for scores in some],
        "worst_score": [min(scores) for scores in some],
        "longer_wins": _known(map(longer_wins, sets)),
    }
    metrics += _intervals(prefix, figures)
    values = np.percentile(every, list(PERCENTILES.values()))
    metrics += [
        Metric(f"{prefix}/score/{name}", float(value), n=len(every))
        for name, value in zip(PERCENTILES, values, strict=True)
    ]
    return [*metrics, Metric(f"{prefix}/all_equal", sum(len(set(scores)) == 1 for scores in some), n=len(some))]


def _answers(row: Row) -> AnswerSet:
    scores = row.get("scores")
    known = (
        isinstance(scores, list)
        and len(scores) == len(row["responses"])
        and all(score is None or is_number(score) for score in scores)
    )
    return AnswerSet([_text(response) for response in row["responses"]], scores if known else None)


def _text(response: object) -> str:
    """Of a response that is text, a message, or messages, the last of which counts."""
    if isinstance(response, list) and response:
        response = response[-1]
    return str(response.get("content")) if isinstance(response, dict) else str(response)


def _ngrams(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + _WORDS]) for start in range(len(words) - _WORDS + 1)]


def _overlap(a: str, b: str) -> float:
    first, second = set(_ngrams(a)), set(_ngrams(b))
    union = first | second
    return len(first & second) / len(union) if union else float(a == b)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
