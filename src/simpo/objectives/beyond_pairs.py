"""Objectives that do not compare a pair directly: whole rankings, and responses judged one by one (APO, NCA, ...)."""

# ruff: noqa: D102, E741 - the base class documents the methods; the papers write w and l for chosen and rejected

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simpo.objectives.objective import OBJECTIVES, POSITIVE, Objective, Responses
from simpo.objectives.preference import Beta, LabelSmoothing, LogRatioObjective

# ---- Whole rankings: the likelihood of the ranking instead of the mean over its pairs.


@dataclass(frozen=True)
class Listwise(Objective):
    """Plackett-Luce, ``[B]``: ``-log sigmoid(r(w) - r(l))`` for a pair, with SimPO's reward ``r(y) = beta * y.avg``.

    For a ranking: the sum of ``log(1 + sum over worse z of exp(r(z) - r(y)))`` over all responses ``y`` that are better
    than another, which is the negative log-likelihood of the ranking. Responses with equal scores do not compete with
    each other. There is no target margin.
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
        # For each better response, log(1 + sum of exp(lead)), with the largest exponent factored out.
        top = torch.zeros_like(rewards).scatter_reduce(0, pairs.better, lead.detach(), "amax")
        terms = top + (-top).exp().index_add(0, pairs.better, (lead - top[pairs.better]).exp()).log()
        # A response occurs in one pair per worse response, but its term counts once.
        count = torch.zeros_like(rewards).index_add(0, pairs.better, torch.ones_like(lead))
        shared = terms[pairs.better] / count[pairs.better]
        return rewards.new_zeros(len(pairs.best)).index_add(0, pairs.comparison, shared)

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * y.avg


@dataclass(frozen=True)
class ListwiseDPO(Listwise):
    """Plackett-Luce, ``[B]``: ``-log sigmoid(r(w) - r(l))`` for a pair, with DPO's reward ``r(y) = beta * y.ratio``.

    Rankings are handled as in ``listwise``.
    """

    name = "listwise_dpo"
    paper = "Rafailov et al. 2023, arXiv 2305.18290, appendix A.3"
    needs = ("reference",)
    average_logps = False
    beta: Beta = 0.1

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * y.ratio


OBJECTIVES.update({objective.name: objective() for objective in (Listwise, ListwiseDPO)})


# ---- Responses judged one by one, although they come in pairs.


@dataclass(frozen=True)
class APOZero(LogRatioObjective):
    """APO-zero, ``[B]``: ``sigmoid(-beta * w.ratio) + sigmoid(beta * l.ratio)``.

    Use it if chosen responses are better than the model's own: it raises chosen and lowers rejected responses, each
    relative to the reference. The paper writes ``1 - sigmoid(x)`` for ``sigmoid(-x)``. On pairs, it equals ``kto`` with
    a reference point of 0.
    """

    name = "apo_zero"
    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7"

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return torch.sigmoid(-self.beta * w.ratio) + torch.sigmoid(self.beta * l.ratio)


@dataclass(frozen=True)
class APODown(APOZero):
    """APO-down, ``[B]``: ``sigmoid(beta * w.ratio) + sigmoid(beta * (l.ratio - w.ratio))``.

    Use it if even chosen responses are worse than the model's own: it lowers both responses, the rejected one more.
    """

    name = "apo_down"
    paper = "D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8"

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return torch.sigmoid(self.beta * w.ratio) + torch.sigmoid(self.beta * (l.ratio - w.ratio))


@dataclass(frozen=True)
class NCA(LogRatioObjective):
    """NCA for pairs, ``[B]``: ``-log s(r(w)) - log s(-r(w)) / 2 - log s(-r(l)) / 2`` with ``r(y) = beta * y.ratio``.

    ``s`` is the sigmoid. The middle term pulls the chosen response back once ``r(w)`` exceeds ``ln 2``.
    """

    name = "nca"
    paper = "Chen et al. 2024, arXiv 2402.05369"
    beta: Beta = 0.01

    def pair(self, w: Responses, l: Responses) -> Tensor:
        chosen, rejected = self.implicit_reward(w), self.implicit_reward(l)
        return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


@dataclass(frozen=True)
class SPPO(LogRatioObjective):
    """SPPO, ``[B]``: ``(w.ratio - t)**2 + (l.ratio + t)**2`` with ``t = (1/2 - label_smoothing) / beta``.

    Each response's log-ratio is pulled to ``(p - 1/2) / beta``, where ``p`` is the probability that it wins: 1 and 0 in
    the hard form, otherwise ``1 - label_smoothing`` and ``label_smoothing``, or a row's ``label_probability``. ``beta``
    is one over the paper's step size ``eta``. The authors' code halves the sum.
    """

    name = "sppo"
    paper = "Wu et al. 2024, arXiv 2405.00675, eq. 4.7"
    beta: Beta = 0.001
    label_smoothing: LabelSmoothing = 0.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        target = (0.5 - self.label_smoothing) / self.beta
        return (w.ratio - target).square() + (l.ratio + target).square()


@dataclass(frozen=True)
class BCO(LogRatioObjective):
    """BCO, ``[B]``: ``-log sigmoid(r(w) - d) - log sigmoid(d - r(l))`` with ``r(y) = beta * y.ratio``.

    Each response is classified as good or bad by its reward. ``d``, the ``reward_shift`` ``[]``, is halfway between the
    mean rewards of chosen and rejected responses. Training estimates it from all rows before the current step; it is 0
    while the policy is the reference.
    """

    name = "bco"
    paper = "Jung et al. 2024, arXiv 2404.04656"
    needs = ("reference", "reward_shift")
    takes_unpaired = True

    def pair(self, w: Responses, l: Responses, reward_shift: Tensor | float = 0.0) -> Tensor:
        chosen, rejected = self.implicit_reward(w), self.implicit_reward(l)
        return -F.logsigmoid(chosen - reward_shift) - F.logsigmoid(reward_shift - rejected)

    def unpaired(self, y: Responses, label: Tensor, reward_shift: Tensor | float = 0.0) -> Tensor:
        above = self.implicit_reward(y) - reward_shift
        return -F.logsigmoid(torch.where(label, above, -above))


OBJECTIVES.update({objective.name: objective() for objective in (APOZero, APODown, NCA, SPPO, BCO)})


# ---- Noise contrastive alignment with K scored responses: NCA and InfoNCA.


@dataclass(frozen=True)
class ListwiseNCA(NCA):
    """NCA, ``[B]``: the same as ``nca`` for a pair.

    For K scored responses ``y_i``: ``-sum_i p_i log s(r(y_i)) - mean_i log s(-r(y_i))``, where ``s`` is the sigmoid,
    ``r(y) = beta * y.ratio``, and ``p`` is the softmax of the scores divided by ``score_temperature``. A pair without
    scores has ``p = (1, 0)``, the limit of a low temperature.
    """

    name = "listwise_nca"
    paper = "Chen et al. 2024, arXiv 2402.05369, and its authors' code"
    needs = ("reference", "scores")
    score_temperature: Annotated[float, POSITIVE, "Divisor of the scores; near 0, only the best response counts."] = 1.0

    def comparisons(self, y: Responses, pairs: Any, scores: Tensor | None = None, **context: Any) -> Tensor:
        """Compute losses ``[C]``; ``scores`` ``[R]`` go from best to worst, and ``(0, -inf)`` means a pair without."""
        rewards = self.implicit_reward(y)
        owner = pairs.best.new_zeros(len(rewards)).index_fill(0, pairs.best, 1).cumsum(0) - 1  # [R]
        if scores is None:
            scores = torch.full_like(rewards, -torch.inf).index_fill(0, pairs.best, 0.0)
        labels = _log_softmax(scores / self.score_temperature, owner, len(pairs.best)).exp().to(rewards)
        return self._scored(rewards, labels, owner, len(pairs.best))

    def _scored(self, rewards: Tensor, labels: Tensor, owner: Tensor, count: int) -> Tensor:
        """Compute the comparisons' losses ``[count]`` from rewards and labels ``p``, ``[R]`` each."""
        size = rewards.new_zeros(count).index_add(0, owner, torch.ones_like(rewards))
        terms = labels * F.logsigmoid(rewards) + F.logsigmoid(-rewards) / size[owner]
        return -rewards.new_zeros(count).index_add(0, owner, terms)


@dataclass(frozen=True)
class InfoNCA(ListwiseNCA):
    """InfoNCA, ``[B]``: ``-log sigmoid(r(w) - r(l))`` with ``r(y) = beta * y.ratio`` for a pair, which is DPO.

    For K scored responses: the cross-entropy between ``p`` as in ``listwise_nca`` and the softmax of the rewards.
    """

    name = "info_nca"

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return -F.logsigmoid(self.implicit_reward(w) - self.implicit_reward(l))

    def _scored(self, rewards: Tensor, labels: Tensor, owner: Tensor, count: int) -> Tensor:
        return -rewards.new_zeros(count).index_add(0, owner, labels * _log_softmax(rewards, owner, count))


def _log_softmax(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Compute the log-softmax of ``values`` ``[R]`` within each of ``count`` groups, given by ``owner`` ``[R]``."""
    largest = values.new_zeros(count).scatter_reduce(0, owner, values.detach(), "amax", include_self=False)
    shifted = values - largest[owner]
    return shifted - values.new_zeros(count).index_add(0, owner, shifted.exp()).log()[owner]


OBJECTIVES.update({objective.name: objective() for objective in (ListwiseNCA, InfoNCA)})
