"""Listwise objectives: the likelihood of a whole ranking of K responses instead of the mean over its pairs."""

# ruff: noqa: D102, E741 - the base class documents the methods; the papers write w and l for chosen and rejected

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simpo.objectives.objective import OBJECTIVES, Objective
from simpo.objectives.preference import Beta
from simpo.objectives.responses import Responses


@dataclass(frozen=True)
class Listwise(Objective):
    """Plackett-Luce, ``[B]``: ``-log sigmoid(r(w) - r(l))`` of a pair, with SimPO's reward ``r(y) = beta * y.avg``.

    Of a ranking: the sum, over its responses ``y`` that are better than others, of
    ``log(1 + sum over worse z of exp(r(z) - r(y)))``, which is the negative log-likelihood of the ranking. Responses
    with equal scores do not compete with each other. There is no target margin.
    """

    name = "listwise"
    paper = "Rafailov et al. 2023, arXiv 2305.18290, appendix A.3, with the reward of arXiv 2405.14734, eq. 4"
    average_logps = True
    beta: Beta = 2.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return -F.logsigmoid(self.implicit_reward(w) - self.implicit_reward(l))

    def comparisons(self, y: Responses, pairs: Any, **context: Any) -> Tensor:
        rewards = self.implicit_reward(y)
        lead = rewards[pairs.worse] - rewards[pairs.better]  # [N]
        # Per better response, log(1 + sum of exp(lead)), after the largest exponent has been subtracted.
        top = torch.zeros_like(rewards).scatter_reduce(0, pairs.better, lead.detach(), "amax")
        terms = top + (-top).exp().index_add(0, pairs.better, (lead - top[pairs.better]).exp()).log()
        # A response has as many pairs as it is better than others, and its term counts once.
        count = torch.zeros_like(rewards).index_add(0, pairs.better, torch.ones_like(lead))
        shared = terms[pairs.better] / count[pairs.better]
        return rewards.new_zeros(len(pairs.best)).index_add(0, pairs.comparison, shared)

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * y.avg


@dataclass(frozen=True)
class ListwiseDPO(Listwise):
    """Plackett-Luce, ``[B]``: ``-log sigmoid(r(w) - r(l))`` of a pair, with DPO's reward ``r(y) = beta * y.ratio``.

    Rankings as in ``listwise``.
    """

    name = "listwise_dpo"
    paper = "Rafailov et al. 2023, arXiv 2305.18290, appendix A.3"
    needs = ("reference",)
    average_logps = False
    beta: Beta = 0.1

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * y.ratio


OBJECTIVES.update({objective.name: objective() for objective in (Listwise, ListwiseDPO)})
