"""Figures of sampled responses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simpo.results import Metric
from simpo.sampling.engine import Sampled
from simpo.statistics import Interval, mean_interval, proportion_interval, share_interval


def response_metrics(texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Sampled]]) -> list[Metric]:
    """Number, lengths and ends of the responses.

    Answers to one prompt are alike, so the intervals of lengths are those of the prompts' means.

    Args:
        texts: the responses to every prompt; as many to each.
        samples: the same as they were sampled.
    """
    ended = [sampled.finished for answers in samples for sampled in answers]
    tokens = [float(np.mean([len(sampled.ids) for sampled in answers])) for answers in samples]
    characters = [float(np.mean([len(text) for text in answers])) for answers in texts]
    metrics = [
        Metric("sample/prompts", len(samples)),
        Metric("sample/responses", len(ended)),
        _metric("sample/tokens", mean_interval(tokens)),
        _metric("sample/characters", mean_interval(characters)),
        _metric("sample/ended", proportion_interval(sum(ended), len(ended))),
        Metric("sample/hit_max_new_tokens", len(ended) - sum(ended), n=len(ended)),
    ]
    if len(texts[0]) > 1:
        distinct = [len(set(answers)) / len(answers) for answers in texts]
        metrics.append(_metric("sample/distinct", share_interval(distinct)))
    return metrics


def _metric(name: str, found: Interval) -> Metric:
    return Metric(name, found.value, None, found.n, found.low, found.high, found.method)
