"""The preference objectives: losses and rewards as in their papers, and the table ``OBJECTIVES``."""

# ruff: noqa: E741 - the papers write w and l for the chosen and the rejected response

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from simpo.objectives.objective import (
    OBJECTIVES,
    Context,
    Finite,
    NonNegative,
    Objective,
    Positive,
    Responses,
    Smoothing,
    Spelling,
)

# ---- The terms that several objectives share: the likelihood of a label, and that of the chosen response.


def preference_nll(margin: Tensor, label_smoothing: float) -> Tensor:
    """``[B]`` negative log-likelihood of the labels under Bradley-Terry, ``margin`` ``[B]`` in nats.

    ``label_smoothing`` is the probability that a label is wrong (Mitchell 2023, cDPO).
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def nll_term(w: Responses, *, lam: NonNegative = 1.0) -> Tensor:
    """Anchor on the chosen response, ``[B]``: ``-lam * w.logp``, a sum over its tokens."""
    return -lam * w.logp


def sft_term(w: Responses) -> Tensor:
    """Anchor on the chosen response, ``[B]``: ``-w.avg``; weighted by ``sft_weight``, in addition to any row.

    With SimPO it gives CPO-SimPO. Each pair counts alike here; the repository of the SimPO paper averages over the
    tokens of the device batch instead, which lets the longest responses dominate and depends on how a step is split.
    """
    return -w.avg


# ---- Objectives that look at the policy alone, one function a row of the table; each reads like its paper.


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
    repository; it has no probability of a wrong label, so ``label_smoothing`` is refused with it.

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

    Hong, Lee, Thorne 2024, arXiv 2403.07691, equations 6 and 7. The pair term is a penalty in addition to supervised
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


# ---- Objectives that compare the policy with a reference, one function a row of the table; conventions as in
# :mod:`simpo.objectives.preference`. All need ``ref_logp``.


def dpo(w: Responses, l: Responses, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """DPO, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio))``.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """
    return preference_nll(beta * (w.ratio - l.ratio), label_smoothing)


def dpo_reward(y: Responses, *, beta: float) -> Tensor:
    """The implicit reward of DPO and its kin, ``[B]``: ``beta * ratio``."""
    return beta * y.ratio


def dpo_norm(w: Responses, l: Responses, *, beta: Positive = 5.0, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Length-normalised DPO, ``[B]``: ``-log sigmoid(beta * (w.avg_ratio - l.avg_ratio))``.

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, whose beta is the default.
    """
    return preference_nll(beta * (w.avg_ratio - l.avg_ratio), label_smoothing)


def dpo_norm_reward(y: Responses, *, beta: float) -> Tensor:
    """Length-normalised DPO's implicit reward, ``[B]``: ``beta * avg_ratio``."""
    return beta * y.avg_ratio


def ipo(w: Responses, l: Responses, *, tau: Positive = 0.1, length_normalized: bool = False) -> Tensor:
    """IPO, ``[B]``: ``(w.ratio - l.ratio - 1 / (2 * tau)) ** 2``.

    Azar et al. 2023, arXiv 2310.12036, equation 17. The paper sums over tokens; ``length_normalized=True`` takes each
    response's average instead, as its authors advise for language models.
    """
    gap = w.avg_ratio - l.avg_ratio if length_normalized else w.ratio - l.ratio
    return (gap - 1 / (2 * tau)).square()


def ipo_reward(y: Responses, *, tau: float, length_normalized: bool) -> Tensor:
    """IPO's implicit reward, ``[B]``: ``tau * ratio``, the average where lengths are normalised."""
    return tau * (y.avg_ratio if length_normalized else y.ratio)


def r_dpo(
    w: Responses,
    l: Responses,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.05,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """R-DPO, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio) + alpha * (w.length - l.length))``.

    Park et al. 2024, arXiv 2403.19159. A pair whose chosen response is the longer one counts as partly won before
    training, so that it teaches less; with the opposite sign, which is also in print, it would teach more. The reward
    is DPO's: lengths do not change in training, and with them the accuracy would tell of the data.
    """
    margin = beta * (w.ratio - l.ratio) + alpha * (w.length - l.length)
    return preference_nll(margin, label_smoothing)


def dpop(
    w: Responses,
    l: Responses,
    *,
    beta: Positive = 0.3,
    lam: NonNegative = 50.0,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """DPO-Positive, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio - lam * relu(-w.ratio)))``.

    Pal et al. 2024 (Smaug), arXiv 2402.13228, section 5 for the defaults. The penalty acts while the chosen response
    is less likely than under the reference.
    """
    margin = beta * (w.ratio - l.ratio - lam * torch.relu(-w.ratio))
    return preference_nll(margin, label_smoothing)


# ---- KTO: desirable and undesirable responses against a reference point, paired or one at a time.


def kto(
    w: Responses,
    l: Responses,
    *,
    beta: Positive = 0.1,
    lam_w: NonNegative = 1.0,
    lam_l: NonNegative = 1.0,
    z_ref: Context = 0.0,
) -> Tensor:
    """KTO, ``[B]``: ``lam_w * sigmoid(z_ref - beta * w.ratio) + lam_l * sigmoid(beta * l.ratio - z_ref)``.

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 7, with ``1 - sigmoid(x)`` written as ``sigmoid(-x)``. The table
    of the SimPO paper prints the second term with the opposite sign, which would raise rejected responses. ``z_ref``
    ``[]`` is the :func:`reference_point` of the optimizer step; 0 is its value while the policy is the reference.
    """
    return lam_w * torch.sigmoid(z_ref - beta * w.ratio) + lam_l * torch.sigmoid(beta * l.ratio - z_ref)


def kto_unpaired(
    y: Responses, label: Tensor, *, beta: float, lam_w: float, lam_l: float, z_ref: Tensor | float
) -> Tensor:
    """KTO on single responses, ``[B]``: the first term of :func:`kto` where ``label`` ``[B]`` is True, else the second.

    ``label`` is of type bool: whether the response is desirable.
    """
    below = z_ref - beta * y.ratio
    return torch.where(label, lam_w * torch.sigmoid(below), lam_l * torch.sigmoid(-below))


def reference_point(mean_ratio: Tensor, beta: float) -> Tensor:
    """KTO's ``z_ref``, ``[]``: ``beta * max(mean_ratio, 0)``, detached.

    Args:
        mean_ratio: ``[]`` mean of ``ratio`` over responses that belong to other prompts than those they are scored
            after, over the whole optimizer step; an estimate of KL(policy || reference), hence never below 0.
        beta: the row's hyperparameter.
    """
    return beta * mean_ratio.detach().clamp(min=0)


# ---- The table of objectives.


_GAMMA = {"gamma": Spelling("gamma_beta_ratio", lambda gamma, values: gamma / values["beta"])}


_ROWS = (
    Objective(
        "simpo",
        simpo,
        simpo_reward,
        paper="Meng, Xia, Chen 2024, arXiv 2405.14734, eq. 6",
        length_normalized=True,
        spellings=_GAMMA,
    ),
    Objective(
        "dpo",
        dpo,
        dpo_reward,
        paper="Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
        needs_reference=True,
    ),
    Objective(
        "ipo",
        ipo,
        ipo_reward,
        paper="Azar et al. 2023, arXiv 2310.12036, eq. 17",
        needs_reference=True,
    ),
    Objective(
        "cpo",
        cpo,
        cpo_reward,
        paper="Xu et al. 2024, arXiv 2401.08417, eq. 3",
        anchor_term=nll_term,
    ),
    Objective(
        "kto",
        kto,
        dpo_reward,
        paper="Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7",
        unpaired_term=kto_unpaired,
        needs_reference=True,
        spellings={"desirable_weight": Spelling("lam_w"), "undesirable_weight": Spelling("lam_l")},
    ),
    Objective(
        "orpo",
        orpo,
        orpo_reward,
        paper="Hong, Lee, Thorne 2024, arXiv 2403.07691, eqs. 6 and 7",
        anchor_term=sft_term,
        length_normalized=True,
    ),
    Objective(
        "r_dpo",
        r_dpo,
        dpo_reward,
        paper="Park et al. 2024, arXiv 2403.19159",
        needs_reference=True,
    ),
    Objective(
        "slic_hf",
        slic_hf,
        slic_hf_reward,
        paper="Zhao et al. 2023, arXiv 2305.10425",
        anchor_term=nll_term,
    ),
    Objective(
        "rrhf",
        rrhf,
        rrhf_reward,
        paper="Yuan et al. 2023, arXiv 2304.05302",
        anchor_term=nll_term,
        length_normalized=True,
    ),
    Objective(
        "dpo_norm",
        dpo_norm,
        dpo_norm_reward,
        paper="Lambert et al. 2024, arXiv 2411.15124",
        needs_reference=True,
        length_normalized=True,
    ),
    Objective(
        "alphapo",
        alphapo,
        alphapo_reward,
        paper="Gupta et al. 2025, arXiv 2501.03884",
        length_normalized=True,
        spellings=_GAMMA,
    ),
    Objective(
        "simper",
        simper,
        simper_reward,
        paper="Xiao et al. 2025, arXiv 2502.00883",
        length_normalized=True,
    ),
    Objective(
        "dpop",
        dpop,
        dpo_reward,
        paper="Pal et al. 2024, arXiv 2402.13228",
        needs_reference=True,
    ),
)


OBJECTIVES.update({row.name: row for row in _ROWS})
