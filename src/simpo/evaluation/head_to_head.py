"""Two models' answers to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simpo.data.context import context_of
from simpo.errors import SimpoError
from simpo.evaluation.answer_files import Record, read_answer_file
from simpo.judges.protocol import Pair
from simpo.results import Metric, Stage
from simpo.statistics import Interval, mean_interval, proportion_interval, share_interval

# A number for one answer to a prompt.
Figure = Callable[[Any, str], float]

# Model ``a`` is compared with the baseline ``b``.
SIDES: dict[Stage, str] = {"before": "b", "after": "a"}


@dataclass(frozen=True)
class Contest:
    """Both models' answers to one prompt; model ``a`` is compared with the baseline ``b``.

    Attributes:
        prompt: text or messages.
        a: the answers of the one, one or more, as ``simpo sample`` stores them.
        b: the answers of the other.
    """

    prompt: Any
    a: Mapping[str, Any]
    b: Mapping[str, Any]


def read_contests(a: Path, b: Path) -> list[Contest]:
    """Pair two files of answers by prompt, in the order of the first.

    Raises:
        SimpoError: one cannot be read, they are not about the same prompts, or one id has two.
    """
    return match_answers(read_answer_file(a), read_answer_file(b), f"{a} and {b}")


def match_answers(a: Mapping[str, Record], b: Mapping[str, Record], names: str) -> list[Contest]:
    """Pair answers by prompt, in the order of the first.

    Args:
        a: the one's answers by the prompts' ids.
        b: the other's.
        names: of both, for the message.

    Raises:
        SimpoError: they are not about the same prompts, or one id has two.
    """
    if a.keys() != b.keys():
        raise SimpoError(
            f"{names}: {len(a.keys() ^ b.keys())} prompts are in one of them only; let both answer the same ones "
            "(a model leaves out those for which its context has no room)"
        )
    other = next((key for key, record in a.items() if record["prompt"] != b[key]["prompt"]), None)
    if other is not None:
        raise SimpoError(f"{names}: id {other!r} is another prompt in each; let both answer the same ones")
    return [Contest(record["prompt"], record, b[key]) for key, record in a.items()]


def meetings(contests: Sequence[Contest]) -> tuple[list[Pair], np.ndarray]:
    """Every answer of the one with every answer of the other to the same prompt, and the number of the prompt."""
    pairs, prompts = [], []
    for number, contest in enumerate(contests):
        ours, theirs = contest.a["responses"], contest.b["responses"]
        lone = len(ours) == len(theirs) == 1
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                key = contest.a["id"] if lone else f"{contest.a['id']}/{i}-{j}"
                pairs.append(Pair(key, contest.prompt, a, b, context_of(contest.a)))
                prompts.append(number)
    return pairs, np.array(prompts)


def win_rate(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Interval:
    """Share of comparisons that ``a`` wins, ties half, with an interval over prompts.

    Every answer of ``a`` meets every answer of ``b`` to the same prompt; a prompt's share is one observation, because
    answers to one prompt are not independent.

    Args:
        a: for each prompt, the scores of the one's answers.
        b: the same of the other's.
    """
    return share_interval([_share(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)])


def _share(x: np.ndarray, y: np.ndarray) -> float:
    difference = x[:, None] - y[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def compare_answers(contests: Sequence[Contest], score: Figure, others: Mapping[str, Figure]) -> list[Metric]:
    """Figures of the baseline ("before") and of the model ("after"), and the model's win rate, over prompts.

    Args:
        contests: the answers; ``a`` is the model, ``b`` the baseline.
        score: decides who wins, from prompt and answer; the higher, the better.
        others: further figures by name.
    """
    ours, theirs = (_values(contests, side, score) for side in ("a", "b"))
    metrics = [_metric("win_rate", "after", win_rate(ours, theirs))]
    for name, figure in {"score": score, **others}.items():
        for stage, side in SIDES.items():
            values = _values(contests, side, figure)
            interval = share_interval if {x for found in values for x in found} <= {0.0, 1.0} else mean_interval
            metrics.append(_metric(name, stage, interval([float(np.mean(found)) for found in values])))
    return metrics + sampled_metrics(contests)


def sampled_metrics(contests: Sequence[Contest]) -> list[Metric]:
    """How long sampled answers are in tokens, over prompts, and how many ended, over answers."""
    metrics = []
    for stage, side in SIDES.items():
        records = [getattr(contest, side) for contest in contests]
        lengths = [float(np.mean([len(ids) for ids in record["response_ids"]])) for record in records]
        ended = [finished for record in records for finished in record["finished"]]
        metrics.append(_metric("response_tokens", stage, mean_interval(lengths)))
        metrics.append(_metric("end_of_turn_rate", stage, proportion_interval(sum(ended), len(ended))))
    return metrics


def text_metrics(contests: Sequence[Contest]) -> list[Metric]:
    """How long answers are in characters, over prompts, and how many are empty."""
    metrics = []
    for stage, side in SIDES.items():
        answers = [getattr(contest, side)["responses"] for contest in contests]
        lengths = [float(np.mean([len(text) for text in texts])) for texts in answers]
        empty = [not text.strip() for texts in answers for text in texts]
        metrics.append(_metric("response_characters", stage, mean_interval(lengths)))
        metrics.append(Metric("empty_responses", sum(empty), stage, len(empty)))
    return metrics


def _values(contests: Sequence[Contest], side: str, figure: Figure) -> list[list[float]]:
    return [
        [float(figure(contest.prompt, text)) for text in getattr(contest, side)["responses"]] for contest in contests
    ]


def _metric(name: str, stage: Stage, found: Interval) -> Metric:
    return Metric(name, found.value, stage, found.n, found.low, found.high, found.method)
