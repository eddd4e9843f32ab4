"""Objectives that look at the policy alone, one function a row of the table; each reads like its paper.

``w`` and ``l`` are the :class:`~simpo.objectives.responses.Responses` of the chosen (winning) and rejected (losing)
responses of ``B`` pairs. A loss is ``[B]`` and unreduced; a reward is ``[B]``. The keyword-only parameters of a loss
are the hyperparameters: names, types, defaults and bounds are read from its signature, and nothing else declares them.
"""

# ruff: noqa: E741 - the papers' w and l

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from simpo.objectives.hyperparameters import Finite, NonNegative, Positive, Smoothing
from simpo.objectives.likelihood import preference_nll
from simpo.objectives.responses import Responses

Link = Literal["sigmoid", "hinge"]


def simpo(
    w: Responses,
    l: Responses,
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: NonNegative = 0.5,
    link: Link = "sigmoid",
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """SimPO, ``[B]``: ``-log sigmoid(beta * (w.avg - l.avg) - gamma)`` with ``gamma = beta * gamma_beta_ratio``.

    Meng, Xia, Chen 2024, arXiv 2405.14734, equation 6. ``link="hinge"`` is the ``relu(1 - margin)`` of the paper's
    repository; it has no probability of a wrong label, so ``label_smoothing`` is refused beside it.

    Raises:
        ValueError: ``label_smoothing`` with the hinge link.
    """
    margin = beta * (w.avg - l.avg - gamma_beta_ratio)
    if link == "hinge":
        if label_smoothing:
            raise ValueError("label_smoothing is defined for link 'sigmoid', not for 'hinge'; set it to 0")
        return torch.relu(1 - margin)
    return preference_nll(margin, label_smoothing)


def simpo_reward(y: Responses, *, beta: float) -> Tensor:
    """SimPO's implicit reward, ``[B]``: ``beta * avg`` (equation 4 of the paper)."""
    return beta * y.avg


def alphapo(
    w: Responses,
    l: Responses,
    *,
    alpha: Finite = 0.25,
    beta: Positive = 2.5,
    gamma_beta_ratio: NonNegative = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """AlphaPO, ``[B]``: ``-log sigmoid(r(w) - r(l) - gamma)`` with ``r(y) = beta * (1 - exp(-alpha * y.avg)) / alpha``.

    Gupta et al. 2025, arXiv 2501.03884; defaults of its Mistral-Instruct run. ``alpha = 0`` is SimPO, the limit.
    """
    rewards = [alphapo_reward(y, alpha=alpha, beta=beta) for y in (w, l)]
    return preference_nll(rewards[0] - rewards[1] - beta * gamma_beta_ratio, label_smoothing)


def alphapo_reward(y: Responses, *, alpha: float, beta: float) -> Tensor:
    """AlphaPO's implicit reward, ``[B]``: ``beta * (1 - p ** -alpha) / alpha`` with ``p = exp(avg)``."""
    return beta * (y.avg if alpha == 0 else -torch.expm1(-alpha * y.avg) / alpha)


def simper(w: Responses, l: Responses) -> Tensor:
    """SimPER, ``[B]``: ``exp(l.avg) - exp(w.avg)``, the difference of inverse perplexities.

    Xiao et al. 2025, arXiv 2502.00883.
    """
    return simper_reward(l) - simper_reward(w)


def simper_reward(y: Responses) -> Tensor:
    """SimPER's reward, ``[B]``: ``exp(avg)``, one over the response's perplexity."""
    return y.avg.exp()


def cpo(
    w: Responses,
    l: Responses,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """CPO's pair term, ``[B]``: ``-log sigmoid(beta * (w.logp - l.logp))``; the anchor is ``-lam * w.logp``.

    Xu et al. 2024, arXiv 2401.08417, equation 3.
    """
    return preference_nll(beta * (w.logp - l.logp), label_smoothing)


def cpo_reward(y: Responses, *, beta: float) -> Tensor:
    """CPO's implicit reward, ``[B]``: ``beta * logp``, DPO's with a uniform reference."""
    return beta * y.logp


def orpo(w: Responses, l: Responses, *, lam: NonNegative = 0.1) -> Tensor:
    """ORPO's pair term, ``[B]``: ``-lam * log sigmoid(w.log_odds - l.log_odds)``; the anchor is ``-w.avg``.

    Hong, Lee, Thorne 2024, arXiv 2403.07691, equations 6 and 7. The pair term is a penalty beside supervised
    fine-tuning and no likelihood of labels, hence no ``label_smoothing``.
    """
    return -lam * F.logsigmoid(w.log_odds - l.log_odds)


def orpo_reward(y: Responses) -> Tensor:
    """ORPO's reward, ``[B]``: ``log_odds``, what the sigmoid compares."""
    return y.log_odds


def slic_hf(w: Responses, l: Responses, *, delta: NonNegative = 1.0) -> Tensor:
    """SLiC-HF's pair term, ``[B]``: ``relu(delta - w.logp + l.logp)``; the anchor is ``-lam * w.logp``.

    Zhao et al. 2023, arXiv 2305.10425, which anchors on the target of its fine-tuning data; data of pairs have none,
    and the chosen response takes its place, as in the table of the SimPO paper.
    """
    return torch.relu(delta - w.logp + l.logp)


def slic_hf_reward(y: Responses) -> Tensor:
    """SLiC-HF's score, ``[B]``: ``logp``, what the margin compares."""
    return y.logp


def rrhf(w: Responses, l: Responses) -> Tensor:
    """RRHF's pair term, ``[B]``: ``relu(l.avg - w.avg)``; the anchor is ``-lam * w.logp``.

    Yuan et al. 2023, arXiv 2304.05302. ``lam``, 1 there, is from the table of the SimPO paper.
    """
    return torch.relu(l.avg - w.avg)


def rrhf_reward(y: Responses) -> Tensor:
    """RRHF's score, ``[B]``: ``avg``, what the ranking compares."""
    return y.avg
