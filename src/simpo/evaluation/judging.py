"""Several judges, the same pairs of answers: what they cost, and what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from simpo.client import Prices, agree
from simpo.errors import SimpoError
from simpo.evaluation.preferences import Judged
from simpo.judges.pairwise import PairwiseApiJudge
from simpo.judges.protocol import Judge, Pair
from simpo.judges.registry import JudgeOptions, make_judge
from simpo.judges.scored import ScorerJudge, verdict_of
from simpo.results import Metric

Say = Callable[[str], None]


def make_judges(names: Sequence[str], options: JudgeOptions) -> dict[str, Judge]:
    """Judges by the names that results call them: their kinds, numbered where one occurs again.

    Args:
        names: as :func:`simpo.judges.registry.make_judge` takes them.
        options: what they need.

    Raises:
        SimpoError: one is named twice or cannot be had.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SimpoError(f"judge {repeated[0]!r} is named twice")
    found: dict[str, Judge] = {}
    for name in names:
        kind = name.partition(":")[0]
        count = sum(other.partition("-")[0] == kind for other in found)
        found[f"{kind}-{count + 1}" if count else kind] = make_judge(name, options)
    return found


def agree_to(judges: Mapping[str, Judge], pairs: Sequence[Pair], *, yes: bool, prices: Prices | None, say: Say) -> None:
    """Ask the user about what judges will send; see :func:`simpo.client.agree`.

    Raises:
        SimpoError: the user does not agree, or cannot be asked.
    """
    for judge in judges.values():
        if isinstance(judge, PairwiseApiJudge):
            agree(judge.estimate(pairs), yes=yes, say=say, prices=prices)


def judge_pairs(
    judges: Mapping[str, Judge], pairs: Sequence[Pair], prompts: np.ndarray, *, prices: Prices | None, say: Say
) -> Judged:
    """Every judge's verdicts, and the differences of scores of those that score.

    Args:
        judges: by name.
        pairs: what they judge.
        prompts: for every pair the number of its prompt, ``[P]``.
        prices: of an API judge's tokens, where they are known.
        say: gets what judges took, and how many pairs are without a verdict.

    Raises:
        SimpoError: a judge failed.
    """
    judged = Judged(pairs, prompts)
    for name, judge in judges.items():
        say(f"judge {name}")
        if isinstance(judge, ScorerJudge):
            judged.margins[name] = np.array(judge.margins(pairs))
            found: list[float | None] = [verdict_of(margin) for margin in judged.margins[name]]
        else:
            found = judge.compare(pairs)
        judged.verdicts[name] = np.array(found, dtype=np.float64)  # None becomes NaN
        if isinstance(judge, PairwiseApiJudge):
            say(judge.client.usage.line(prices))
        if missing := int(np.isnan(judged.verdicts[name]).sum()):
            say(f"note: judge {name} gave no verdict on {missing:,} of {len(pairs):,} pairs; they do not count")
    return judged


def order_metrics(judges: Mapping[str, Judge], pairs: int) -> list[Metric]:
    """How often a judge named another winner when the order of the answers was turned.

    And how many replies it gave at its server's default temperature, where it did.
    """
    asked = {name: judge for name, judge in judges.items() if isinstance(judge, PairwiseApiJudge)}
    conflicting = [Metric(f"conflicting_orders/{name}", judge.conflicting, n=pairs) for name, judge in asked.items()]
    return conflicting + [
        Metric(f"judged_at_default_temperature/{name}", count, n=judge.client.usage.replies)
        for name, judge in asked.items()
        if (count := judge.client.usage.default_temperature)
    ]
