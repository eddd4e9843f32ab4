"""Rollouts: which prompts are answered when, and the training rows that scored answers become."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor

from simpo.data.messages import Context
from simpo.data.prompts import Prompt
from simpo.data.tokenizing import TOKENS
from simpo.errors import SimpoError
from simpo.generation.engine import Sampled
from simpo.objectives.policy_gradient import advantages, kl_estimate, sum_by, whiten
from simpo.objectives.ppo import ScoreScale, adapt_kl_coefficient
from simpo.training.batches import (
    ADVANTAGES,
    BEHAVIOR,
    CONTENT,
    LABEL_PROBABILITY,
    REF_LOGPS,
    REF_TOKENS,
    RETURNS,
    ROLLOUT,
    VALUES,
)
from simpo.training.online_config import OnlineConfig

Record = Mapping[str, Any]  # a prompt with its scored answers, a line of a rollout's file
# Metrics of the answers to a prompt, in the column ROLLOUT: mean score, estimated KL(policy || start) per answer,
# mean tokens, share that ended by themselves, share that repeat another one, share without a score, whether all scores
# are equal, so that the prompt teaches nothing (to a policy gradient without a value function), share of scores that
# score_clip changes, the KL coefficient of the rollout, and the mean score by the gold annotator.
_PARTS = (
    *("reward", "kl", "length", "ended", "identical", "missing_scores", "equal_scores", "clipped_scores", "kl_coef"),
    "gold",
)
ROLLOUT_NAMES = tuple(f"rollout/{name}" for name in _PARTS)


class AnsweredPrompt(NamedTuple):
    """A prompt with its answers, as an annotator receives them."""

    prompt: Prompt
    samples: list[Sampled]
    texts: list[str]


# Scores of all answers to each prompt, the higher the better; None where no score can be given.
Annotator = Callable[[Sequence[AnsweredPrompt]], Sequence[Sequence[float | None]]]


def prompts_from_rows(rows: Dataset) -> list[Prompt]:
    """The prompts of rows that :meth:`~simpo.training.online.OnlineTrainer.prepare` has made."""
    found = [json.loads(text) for text in rows[CONTENT][:]]
    return [Prompt(**fields | {"context": Context(**fields["context"])}) for fields in found]


class Place(NamedTuple):
    """The position of a step: its rollout, the rollout's first step, the pass over its prompts, the minibatch in it."""

    rollout: int
    first_step: int
    prompts: np.ndarray
    epoch: int
    minibatch: int


@dataclass(frozen=True)
class Schedule:
    """The prompts of each rollout and of each optimizer step."""

    prompts: int  # number of prompts
    per_step: int  # prompts of a step, over all ranks; the last step of a pass over the data may have fewer
    sync_every: int  # steps of a rollout; the last one of a pass over the data may have fewer
    rollout_epochs: int  # passes over the prompts of a rollout
    seed: int | None  # with the pass over the data, determines the order of the prompts; None keeps it
    drop_last: bool  # leave out an incomplete last step

    @property
    def minibatches(self) -> int:
        """Steps of a pass over the data in which every prompt is used once."""
        full, rest = divmod(self.prompts, self.per_step)
        return full + (rest > 0 and not self.drop_last)

    @property
    def steps(self) -> int:
        """Optimizer steps of a pass over the data."""
        return self.minibatches * self.rollout_epochs

    def place(self, data_epoch: int, step: int) -> Place:
        """The position of ``step`` of a pass over the data."""
        block, within = divmod(step, self.sync_every)
        size = self.sync_every // self.rollout_epochs  # minibatches of a rollout
        epoch, minibatch = divmod(within, min(size, self.minibatches - block * size))
        rollout = data_epoch * math.ceil(self.steps / self.sync_every) + block
        first_step = data_epoch * self.steps + block * self.sync_every
        order = np.arange(self.prompts)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, data_epoch)).permutation(self.prompts)
        order = order[: self.minibatches * self.per_step]
        chosen = order[block * size * self.per_step : (block + 1) * size * self.per_step]
        return Place(rollout, first_step, chosen, epoch, minibatch)

    def order(self, place: Place) -> np.ndarray:
        """The order in which a pass takes a rollout's prompts; the first is that of the data, others are shuffled."""
        if place.epoch == 0 or self.seed is None:
            return np.arange(len(place.prompts))
        return np.random.default_rng((self.seed, place.rollout, place.epoch)).permutation(len(place.prompts))


# ---- From scored answers to training rows.


def final_scores(record: Record, unfinished_score: float | None) -> list[float | None]:
    """Scores of a prompt's answers, with ``unfinished_score`` for those that were cut off."""
    if unfinished_score is None:
        return list(record["scores"])
    columns = zip(record["scores"], record["finished"], strict=True)
    return [score if finished else unfinished_score for score, finished in columns]


def adapted_columns(
    records: Sequence[Record], previous: Sequence[Record] | None, args: OnlineConfig
) -> dict[str, float]:
    """Columns of a policy gradient's rollout that depend on the rollouts before it, the same in all of its records.

    They are the KL coefficient, and mean and standard deviation of the start model's scores. ``records`` are the
    rollout without these columns, and ``previous`` is the rollout before it, if there is one.
    """
    if previous is not None:
        coefficient = previous[0]["kl_coef"]
        if args.kl_target is not None:
            answers = sum(len(record["response_ids"]) for record in previous)
            measured = sum(map(_divergence, previous)) / answers
            assert args.kl_horizon is not None
            coefficient = adapt_kl_coefficient(
                coefficient, measured, answers, target=args.kl_target, horizon=args.kl_horizon
            )
        return {"kl_coef": coefficient, **{key: previous[0][key] for key in ("score_mean", "score_std")}}
    scale = ScoreScale()
    if args.normalize_scores:
        scores = [score for record in records for score in final_scores(record, args.unfinished_score)]
        known = [score for score in scores if score is not None]
        try:
            scale = ScoreScale.of(torch.tensor(known or [0.0], dtype=torch.float64))
        except ValueError as error:
            raise SimpoError(f"normalize_scores: rollout 0: {error}; leave it out") from error
    assert args.kl_coef is not None
    return {"kl_coef": args.kl_coef, "score_mean": scale.mean, "score_std": scale.std}


def training_rows(records: Sequence[Record], args: OnlineConfig) -> Dataset:
    """A rollout's prompts with the answers that are trained on; always one row per prompt.

    For a policy gradient these are all answers, with an advantage for every token: 0 for an answer without a score,
    and where the baseline needs more scores of a prompt than there are. For a preference objective they are those that
    are compared, the best first, with scores; where two different scores are missing, the scores are equal and there
    is no pair.
    """
    scores = [final_scores(record, args.unfinished_score) for record in records]
    estimates = {} if args.gradient is None else _advantages_and_returns(records, scores, args)
    rows = []
    for number, (record, row_scores) in enumerate(zip(records, scores, strict=True)):
        row = {
            "prompt_ids": record["prompt_ids"],
            "where": record["where"],
            ROLLOUT: _metrics(record, row_scores, args),
        }
        reference = record["ref_logps"]
        if args.gradient is None:
            chosen, ranked = _select_compared(row_scores, args.pairs)
            row |= {"response_ids": [record["response_ids"][k] for k in chosen], "scores": ranked}
            if args.soft_labels:
                row[LABEL_PROBABILITY] = 1 / (1 + math.exp(ranked[1] - ranked[0]))
            if reference is not None:
                row[REF_LOGPS] = [sum(reference[k]) for k in chosen]
        else:
            row |= {"response_ids": record["response_ids"]} | {name: of[number] for name, of in estimates.items()}
            row |= {BEHAVIOR: list(chain(*record["behavior_logps"])), REF_TOKENS: list(chain(*reference))}
            if record["values"] is not None:
                row[VALUES] = list(chain(*record["values"]))
        rows.append(row)
    kinds: dict[str, Any] = dict.fromkeys(rows[0], List(Value("float64")))
    kinds |= {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "where": Value("string")}
    if args.soft_labels:
        kinds[LABEL_PROBABILITY] = Value("float64")
    return Dataset.from_list(rows, features=Features(kinds))


def _divergence(record: Record) -> float:
    """The estimate of KL(policy || start model) of a prompt's answers, added up."""
    return sum(map(sum, record["behavior_logps"])) - sum(map(sum, record["ref_logps"]))


def _scaled(record: Record, scores: Sequence[float | None], clip: float | None) -> list[float | None]:
    scale = ScoreScale(record["score_mean"], record["score_std"])
    return [None if score is None else scale.apply(score, clip) for score in scores]


def _metrics(record: Record, scores: Sequence[float | None], args: OnlineConfig) -> list[float]:
    """The values of :data:`ROLLOUT_NAMES`; NaN where there are none."""
    ids, known = record["response_ids"], [score for score in scores if score is not None]
    gold = [score for score in record.get("gold_scores", ()) if score is not None]
    clipped = coefficient = math.nan
    if args.gradient is not None:
        coefficient = record["kl_coef"]
        pairs = zip(_scaled(record, known, args.score_clip), _scaled(record, known, None), strict=True)
        clipped = sum(one != other for one, other in pairs) / len(known) if known else math.nan
    return [
        sum(known) / len(known) if known else math.nan,
        math.nan if record["ref_logps"] is None else _divergence(record) / len(ids),
        sum(map(len, ids)) / len(ids),
        sum(record["finished"]) / len(ids),
        1 - len(set(map(tuple, ids))) / len(ids),
        record["scores"].count(None) / len(ids),
        float(len(set(known)) < 2),
        clipped,
        coefficient,
        sum(gold) / len(gold) if gold else math.nan,
    ]


def _select_compared(scores: Sequence[float | None], pairs: str) -> tuple[list[int], list[float]]:
    """The answers that are compared, the best first, and their scores."""
    order = sorted((k for k, score in enumerate(scores) if score is not None), key=lambda k: -scores[k])  # type: ignore[operator]
    if len(order) < 2:
        return [0, 1], [0.0, 0.0]
    chosen = [order[0], order[-1]] if pairs == "best_worst" else order
    return chosen, [scores[k] for k in chosen]  # type: ignore[misc]


def _advantages_and_returns(
    records: Sequence[Record], scores: Sequence[Sequence[float | None]], args: OnlineConfig
) -> dict[str, list[list[float]]]:
    """Advantages, and for PPO returns, of all tokens: by the column's name a list for every prompt."""
    gradient, ppo = args.gradient, args.ppo
    assert gradient is not None
    each = [logps for record in records for logps in record["behavior_logps"]]
    segment = torch.arange(len(each)).repeat_interleave(torch.tensor(list(map(len, each))))  # [S]
    group = torch.arange(len(records)).repeat_interleave(torch.tensor(list(map(len, scores))))  # [R]
    rewards = [
        one for record, own in zip(records, scores, strict=True) for one in _scaled(record, own, args.score_clip)
    ]
    known = torch.tensor([reward is not None for reward in rewards])
    reward = _doubles([one or 0.0 for one in rewards])  # [R]
    penalty = torch.zeros(len(segment), dtype=torch.float64)
    if args.kl_in == "reward":
        behavior, start = (
            _doubles([value for record in records for logps in record[name] for value in logps])
            for name in ("behavior_logps", "ref_logps")
        )
        assert args.kl_estimator is not None
        penalty = records[0]["kl_coef"] * kl_estimate(behavior, start, args.kl_estimator)
    if gradient.baseline in ("leave_one_out", "group"):  # a lone score is its own baseline
        known &= torch.bincount(group[known], minlength=len(records))[group] > 1
    of_known = known[segment]
    advantage, returns = torch.zeros_like(penalty), torch.full_like(penalty, torch.nan)
    if known.any():
        numbers, segments = segment[of_known].unique_consecutive(return_inverse=True)
        if ppo is not None:
            values = _doubles([value for record in records for own in record["values"] for value in own])
            found, returns[of_known] = ppo.estimate(reward[known], penalty[of_known], values[of_known], segments)
            found = whiten(found) if args.whiten_advantages else found
        else:
            whole = reward[known] - sum_by(penalty[of_known], segments, len(numbers))
            groups = group[known].unique_consecutive(return_inverse=True)[1]
            whole = advantages(whole, groups, gradient.baseline, scale_by_std=gradient.scale_by_std)
            found = (whiten(whole) if args.whiten_advantages else whole)[segments]
        advantage[of_known] = found
    sizes = torch.bincount(group[segment], minlength=len(records)).tolist()
    columns = {ADVANTAGES: advantage} if ppo is None else {ADVANTAGES: advantage, RETURNS: returns}
    return {name: [own.tolist() for own in column.split(sizes)] for name, column in columns.items()}


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
