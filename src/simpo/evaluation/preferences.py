"""Verdicts on pairs of answers to figures: win rates, ties, and whether two judges agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from simpo.evaluation.length_control import length_controlled_win_rate
from simpo.judges.protocol import Pair
from simpo.results import Metric
from simpo.statistics import Interval, bootstrap_interval, cohen_kappa


@dataclass(frozen=True)
class Judged:
    """Pairs of answers and every judge's verdicts on them.

    Attributes:
        pairs: ``a`` the one model's answer, ``b`` the other's.
        prompts: for every pair the number of its prompt, ``[P]``.
        verdicts: judge -> ``[P]``, 1 where ``a`` wins, 0 where ``b`` does, or between; NaN where there is no verdict.
        margins: judge -> ``[P]``, by how much the score of ``a`` is above that of ``b``, of judges that score.
    """

    pairs: Sequence[Pair]
    prompts: np.ndarray
    verdicts: dict[str, np.ndarray] = field(default_factory=dict)
    margins: dict[str, np.ndarray] = field(default_factory=dict)


def preference_metrics(judged: Judged, seed: int) -> list[Metric]:
    """The figures of every judge, and of every two of them.

    Args:
        judged: pairs and verdicts.
        seed: of the bootstrap.
    """
    metrics = []
    for judge, verdicts in judged.verdicts.items():
        metrics += _judge_metrics(judge, judged, verdicts, seed)
    for (one, first), (other, second) in combinations(judged.verdicts.items(), 2):
        metrics += _agreement_metrics(f"{one}+{other}", judged.prompts, first, second, seed)
    return metrics


def win_rate_over_prompts(verdicts: np.ndarray, prompts: np.ndarray, seed: int) -> Interval | None:
    """Mean over prompts of the share that ``a`` wins, ties half, with a bootstrap interval over prompts.

    Args:
        verdicts: ``[P]``; NaN, where there is none, does not count.
        prompts: ``[P]``, which prompt each pair belongs to.
        seed: of the bootstrap.

    Returns:
        The win rate, n the number of prompts with a verdict; None without any.
    """
    known = ~np.isnan(verdicts)
    if not known.any():
        return None
    _, prompt, pairs = np.unique(prompts[known], return_inverse=True, return_counts=True)
    shares = np.bincount(prompt, weights=verdicts[known]) / pairs
    return bootstrap_interval(np.column_stack([shares, np.ones(len(shares))]), _ratio, seed=seed)


def _judge_metrics(judge: str, judged: Judged, verdicts: np.ndarray, seed: int) -> list[Metric]:
    known = ~np.isnan(verdicts)
    longer = np.array([len(pair.a) - len(pair.b) for pair in judged.pairs], dtype=np.float64)
    controlled = None
    if known.any():
        controlled = length_controlled_win_rate(verdicts[known], longer[known], judged.prompts[known])
    return [
        _metric(f"win_rate/{judge}", win_rate_over_prompts(verdicts, judged.prompts, seed)),
        _metric(f"length_controlled_win_rate/{judge}", controlled),
        Metric(f"ties/{judge}", float(np.mean(verdicts[known] == 0.5)) if known.any() else None, n=int(known.sum())),
        Metric(f"without_verdict/{judge}", int((~known).sum()), n=len(verdicts)),
    ]


def _agreement_metrics(
    name: str, prompts: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int
) -> list[Metric]:
    """How often two judges say the same (``a``, tie or ``b``), and how far beyond chance, over prompts."""
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        return [Metric(f"agreement/{name}", None, n=0), Metric(f"kappa/{name}", None, n=0)]
    said = 3 * _winner(first[both]) + _winner(second[both])
    _, prompt = np.unique(prompts[both], return_inverse=True)
    tables = np.zeros((prompt.max() + 1, 9))
    np.add.at(tables, (prompt, said), 1.0)
    return [
        _metric(f"agreement/{name}", bootstrap_interval(tables, _agreement, seed=seed)),
        _metric(f"kappa/{name}", bootstrap_interval(tables, _kappa, seed=seed)),
    ]


def _winner(verdicts: np.ndarray) -> np.ndarray:
    """0 for ``b``, 1 for a tie, 2 for ``a``."""
    return (np.sign(verdicts - 0.5) + 1).astype(np.int64)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _agreement(tables: np.ndarray) -> np.ndarray:
    return tables[..., ::4].sum(-1) / tables.sum(-1)  # the diagonal of three by three


def _kappa(tables: np.ndarray) -> np.ndarray:
    return cohen_kappa(tables.reshape(*tables.shape[:-1], 3, 3))


def _metric(name: str, found: Interval | None) -> Metric:
    if found is None:
        return Metric(name, None)
    return Metric(name, found.value, None, found.n, found.low, found.high, found.method)
