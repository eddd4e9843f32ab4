"""Noise contrastive alignment with K scored responses: NCA and InfoNCA."""

# ruff: noqa: D102, E741 - the base class documents the methods; the papers write w and l for chosen and rejected

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simpo.objectives.objective import OBJECTIVES, POSITIVE
from simpo.objectives.pointwise import NCA
from simpo.objectives.responses import Responses


@dataclass(frozen=True)
class ListwiseNCA(NCA):
    """NCA, ``[B]``: ``nca`` of a pair.

    For K scored responses ``y_i``: ``-sum_i p_i log s(r(y_i)) - mean_i log s(-r(y_i))``, where ``s`` is the sigmoid,
    ``r(y) = beta * y.ratio``, and ``p`` is the softmax of the scores divided by ``score_temperature``. A pair without
    scores has ``p = (1, 0)``, the limit of a low temperature.
    """

    name = "listwise_nca"
    paper = "Chen et al. 2024, arXiv 2402.05369, and its authors' code"
    needs = ("reference", "scores")
    score_temperature: Annotated[float, POSITIVE, "Scores are divided by it; near 0, only the best one counts."] = 1.0

    def comparisons(self, y: Responses, pairs: Any, scores: Tensor | None = None, **context: Any) -> Tensor:
        """``[C]`` losses; ``scores`` ``[R]`` are ordered from best to worst; ``(0, -inf)`` for a pair without."""
        rewards = self.implicit_reward(y)
        owner = pairs.best.new_zeros(len(rewards)).index_fill(0, pairs.best, 1).cumsum(0) - 1  # [R]
        if scores is None:
            scores = torch.full_like(rewards, -torch.inf).index_fill(0, pairs.best, 0.0)
        labels = _log_softmax(scores / self.score_temperature, owner, len(pairs.best)).exp().to(rewards)
        return self._scored(rewards, labels, owner, len(pairs.best))

    def _scored(self, rewards: Tensor, labels: Tensor, owner: Tensor, count: int) -> Tensor:
        """``[count]`` losses of the comparisons, from the rewards and labels ``p`` of their responses, ``[R]`` each."""
        size = rewards.new_zeros(count).index_add(0, owner, torch.ones_like(rewards))
        terms = labels * F.logsigmoid(rewards) + F.logsigmoid(-rewards) / size[owner]
        return -rewards.new_zeros(count).index_add(0, owner, terms)


@dataclass(frozen=True)
class InfoNCA(ListwiseNCA):
    """InfoNCA, ``[B]``: ``-log sigmoid(r(w) - r(l))`` of a pair, with ``r(y) = beta * y.ratio``: DPO.

    For K scored responses: the cross-entropy of the softmax of their rewards with ``p`` of ``listwise_nca``.
    """

    name = "info_nca"

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return -F.logsigmoid(self.implicit_reward(w) - self.implicit_reward(l))

    def _scored(self, rewards: Tensor, labels: Tensor, owner: Tensor, count: int) -> Tensor:
        return -rewards.new_zeros(count).index_add(0, owner, labels * _log_softmax(rewards, owner, count))


def _log_softmax(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """``[R]`` log-softmax of ``values`` ``[R]`` among those with the same ``owner`` ``[R]``, one of ``count``."""
    top = values.new_zeros(count).scatter_reduce(0, owner, values.detach(), "amax", include_self=False)
    lead = values - top[owner]
    return lead - values.new_zeros(count).index_add(0, owner, lead.exp()).log()[owner]


OBJECTIVES.update({objective.name: objective() for objective in (ListwiseNCA, InfoNCA)})
