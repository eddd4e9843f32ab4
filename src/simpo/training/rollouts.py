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

from simpo.data.messages import Context
from simpo.data.prompts import Prompt
from simpo.data.tokenizing import TOKENS
from simpo.generation.engine import Sampled
from simpo.objectives.policy_gradient import PolicyGradient, advantages, kl_estimate, whiten
from simpo.training.batches import ADVANTAGES, BEHAVIOR, REF_LOGPS, REF_TOKENS, ROLLOUT
from simpo.training.online_config import OnlineConfig

CONTENT = "content"  # the column of a data set's prompts, which tells them from other rows
Record = Mapping[str, Any]  # a prompt with its scored answers, a line of a rollout's file
# Of the answers to a prompt, in the column ROLLOUT: mean score, estimate of KL(policy || start model) per answer, mean
# tokens, share that ended by themselves, share that repeat another one, share without a score, and whether all scores
# are equal, so that the prompt teaches nothing.
ROLLOUT_NAMES = tuple(
    f"rollout/{name}" for name in ("reward", "kl", "length", "ended", "identical", "missing_scores", "equal_scores")
)


class Answered(NamedTuple):
    """A prompt with its answers, as an annotator receives them."""

    prompt: Prompt
    samples: list[Sampled]
    texts: list[str]


# Scores of all answers to each prompt, the higher the better; None where no score can be given.
Annotator = Callable[[Sequence[Answered]], Sequence[Sequence[float | None]]]


def prompts_of(rows: Dataset) -> list[Prompt]:
    """The prompts of rows that :meth:`~simpo.training.online.OnlineTrainer.prepare` has made."""
    found = [json.loads(text) for text in rows[CONTENT][:]]
    return [Prompt(**fields | {"context": Context(**fields["context"])}) for fields in found]


class Place(NamedTuple):
    """Where a step is: its rollout, the rollout's first step, the pass over its prompts, the minibatch in the pass."""

    rollout: int
    first_step: int
    prompts: np.ndarray
    epoch: int
    minibatch: int


@dataclass(frozen=True)
class Schedule:
    """Which prompts each rollout has, and which of them each optimizer step.

    Attributes:
        prompts: number of prompts.
        per_step: prompts of a step, over all ranks; the last step of a pass over the data may have fewer.
        sync_every: steps of a rollout; the last one of a pass over the data may have fewer.
        rollout_epochs: passes over the prompts of a rollout.
        seed: with the pass over the data, determines the order of the prompts; None keeps it.
        drop_last: leave out an incomplete last step.
    """

    prompts: int
    per_step: int
    sync_every: int
    rollout_epochs: int
    seed: int | None
    drop_last: bool

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
        """Where ``step`` of a pass over the data is."""
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


def training_rows(records: Sequence[Record], args: OnlineConfig) -> Dataset:
    """A rollout's prompts with the answers that are trained on; always one row per prompt.

    For a policy gradient these are all answers, with an advantage for every token: 0 for an answer without a score,
    and where the baseline needs more scores of a prompt than there are. For a preference objective they are those that
    are compared, the best first, with scores; where two different scores are missing, the scores are equal and there
    is no pair.
    """
    gradient = args.gradient
    scores = [final_scores(record, args.unfinished_score) for record in records]
    rows = []
    token_advantages = None if gradient is None else iter(_token_advantages(records, scores, gradient, args))
    for record, own in zip(records, scores, strict=True):
        row = {"prompt_ids": record["prompt_ids"], "where": record["where"], ROLLOUT: _metrics(record, own)}
        reference = record["ref_logps"]
        if token_advantages is None:
            chosen, ranked = _compared(own, args.pairs)
            row |= {"response_ids": [record["response_ids"][k] for k in chosen], "scores": ranked}
            if reference is not None:
                row[REF_LOGPS] = [sum(reference[k]) for k in chosen]
        else:
            row |= {"response_ids": record["response_ids"], ADVANTAGES: next(token_advantages)}
            row |= {BEHAVIOR: list(chain(*record["behavior_logps"])), REF_TOKENS: list(chain(*reference))}
        rows.append(row)
    kinds: dict[str, Any] = dict.fromkeys(rows[0], List(Value("float64")))
    kinds |= {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "where": Value("string")}
    return Dataset.from_list(rows, features=Features(kinds))


def _metrics(record: Record, scores: Sequence[float | None]) -> list[float]:
    """The values of :data:`ROLLOUT_NAMES`; NaN where there are none."""
    ids, known = record["response_ids"], [score for score in scores if score is not None]
    kl = math.nan
    if record["ref_logps"] is not None:
        kl = (sum(map(sum, record["behavior_logps"])) - sum(map(sum, record["ref_logps"]))) / len(ids)
    return [
        sum(known) / len(known) if known else math.nan,
        kl,
        sum(map(len, ids)) / len(ids),
        sum(record["finished"]) / len(ids),
        1 - len(set(map(tuple, ids))) / len(ids),
        record["scores"].count(None) / len(ids),
        float(len(set(known)) < 2),
    ]


def _compared(scores: Sequence[float | None], pairs: str) -> tuple[list[int], list[float]]:
    """The answers that are compared, the best first, and their scores."""
    order = sorted((k for k, score in enumerate(scores) if score is not None), key=lambda k: -scores[k])  # type: ignore[operator]
    if len(order) < 2:
        return [0, 1], [0.0, 0.0]
    chosen = [order[0], order[-1]] if pairs == "best_worst" else order
    return chosen, [scores[k] for k in chosen]  # type: ignore[misc]


def _token_advantages(
    records: Sequence[Record], scores: Sequence[Sequence[float | None]], gradient: PolicyGradient, args: OnlineConfig
) -> list[list[float]]:
    """For every prompt the advantages of its answers' tokens, one answer after another."""
    rewards, group, usable = [], [], []
    needed = 1 if gradient.baseline == "batch" else 2
    for number, (record, own) in enumerate(zip(records, scores, strict=True)):
        enough = sum(score is not None for score in own) >= needed
        for score, logps, reference in zip(own, record["behavior_logps"], record["ref_logps"], strict=True):
            penalty = 0.0
            if args.kl_in == "reward" and args.kl_coef:
                assert args.kl_estimator is not None
                behavior, start = torch.tensor([logps, reference], dtype=torch.float64)
                penalty = args.kl_coef * kl_estimate(behavior, start, args.kl_estimator).sum().item()
            rewards.append((0.0 if score is None else score) - penalty)
            group.append(number)
            usable.append(score is not None and enough)
    values = torch.zeros(len(rewards), dtype=torch.float64)
    counted = torch.tensor(usable)
    if counted.any():
        known = torch.tensor(rewards, dtype=torch.float64)[counted]
        _, groups = torch.tensor(group)[counted].unique_consecutive(return_inverse=True)
        found = advantages(known, groups, gradient.baseline, scale_by_std=gradient.scale_by_std)
        values[counted] = whiten(found) if args.whiten_advantages else found
    each = iter(values.tolist())
    return [[value for ids in record["response_ids"] for value in [next(each)] * len(ids)] for record in records]
