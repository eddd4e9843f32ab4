"""Preference objectives, one class each, with losses and rewards as in their papers."""

# ruff: noqa: D102, E741 - the base class documents the methods; the papers write w and l for chosen and rejected

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from simpo.objectives.objective import (
    BELOW_HALF,
    FINITE,
    NON_NEGATIVE,
    OBJECTIVES,
    OPEN_UNIT,
    POSITIVE,
    Alias,
    Objective,
    Responses,
)

# ---- Shared by several objectives.

Beta = Annotated[float, POSITIVE, "Scale of the implicit reward."]
GammaBetaRatio = Annotated[float, NON_NEGATIVE, "Target margin between the rewards, in units of beta."]
LabelSmoothing = Annotated[float, BELOW_HALF, "Probability that a label is wrong."]
Link = Annotated[Literal["sigmoid", "hinge"], "Loss on the margin: -log sigmoid(margin), or relu(1 - margin)."]
AnchorWeight = Annotated[float, NON_NEGATIVE, "Weight of the chosen response's negative log-likelihood."]

_GAMMA = {"gamma": Alias("gamma_beta_ratio", lambda gamma, values: gamma / values["beta"])}


def preference_nll(margin: Tensor, label_smoothing: float) -> Tensor:
    """Compute the negative log-likelihood ``[B]`` of the labels under Bradley-Terry; ``margin`` ``[B]`` is in nats.

    ``label_smoothing`` is the probability that a label is wrong (Mitchell 2023, cDPO).
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def sft_term(w: Responses) -> Tensor:
    """Return ``-w.avg``, ``[B]``, the term that ``sft_weight`` adds to any objective.

    Added to SimPO, it gives CPO-SimPO. All pairs count equally here. The SimPO paper's code averages over the tokens of
    the device batch instead, which lets the longest responses dominate and depends on how a step is split.
    """
    return -w.avg


# ---- Objectives that use the policy alone.


@dataclass(frozen=True)
class SimPO(Objective):
    """SimPO, ``[B]``: ``-log sigmoid(beta * (w.avg - l.avg) - gamma)`` with ``gamma = beta * gamma_beta_ratio``.

    ``link="hinge"`` is ``relu(1 - margin)`` as in the paper's code. It is not a likelihood of labels, so it rejects
    ``label_smoothing``.
    """

    name = "simpo"
    paper = "Meng, Xia, Chen 2024, arXiv 2405.14734, eq. 6"
    average_logps = True
    aliases = _GAMMA
    beta: Beta = 2.0
    gamma_beta_ratio: GammaBetaRatio = 0.5
    link: Link = "sigmoid"
    label_smoothing: LabelSmoothing = 0.0

    def __post_init__(self) -> None:
        if self.link == "hinge" and self.label_smoothing:
            raise ValueError("label_smoothing is defined for link 'sigmoid', not for 'hinge'; set it to 0")

    def pair(self, w: Responses, l: Responses) -> Tensor:
        margin = self.beta * (w.avg - l.avg - self.gamma_beta_ratio)
        return torch.relu(1 - margin) if self.link == "hinge" else preference_nll(margin, self.label_smoothing)

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * y.avg  # equation 4 of the paper


@dataclass(frozen=True)
class AlphaPO(Objective):
    """AlphaPO, ``[B]``: ``-log sigmoid(r(w) - r(l) - gamma)`` with ``r(y) = beta * (1 - exp(-alpha * y.avg)) / alpha``.

    The defaults are those of the paper's Mistral-Instruct run. The limit ``alpha = 0`` is SimPO.
    """

    name = "alphapo"
    paper = "Gupta et al. 2025, arXiv 2501.03884"
    average_logps = True
    aliases = _GAMMA
    alpha: Annotated[float, FINITE, "Curvature of the reward; 0 is SimPO's reward."] = 0.25
    beta: Beta = 2.5
    gamma_beta_ratio: GammaBetaRatio = 0.1
    label_smoothing: LabelSmoothing = 0.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        margin = self.implicit_reward(w) - self.implicit_reward(l) - self.beta * self.gamma_beta_ratio
        return preference_nll(margin, self.label_smoothing)

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * (y.avg if self.alpha == 0 else -torch.expm1(-self.alpha * y.avg) / self.alpha)


@dataclass(frozen=True)
class SimPER(Objective):
    """SimPER, ``[B]``: ``exp(l.avg) - exp(w.avg)``, the difference between inverse perplexities."""

    name = "simper"
    paper = "Xiao et al. 2025, arXiv 2502.00883"
    average_logps = True

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return self.implicit_reward(l) - self.implicit_reward(w)

    def implicit_reward(self, y: Responses) -> Tensor:
        return y.avg.exp()  # one over the response's perplexity


@dataclass(frozen=True)
class CPO(Objective):
    """CPO's pair term, ``[B]``: ``-log sigmoid(beta * (w.logp - l.logp))``; the anchor is ``-lam * w.logp``."""

    name = "cpo"
    paper = "Xu et al. 2024, arXiv 2401.08417, eq. 3"
    beta: Beta = 0.1
    label_smoothing: LabelSmoothing = 0.0
    lam: AnchorWeight = 1.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return preference_nll(self.beta * (w.logp - l.logp), self.label_smoothing)

    def anchor(self, w: Responses) -> Tensor:
        return -self.lam * w.logp

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * y.logp  # DPO's reward with a uniform reference


@dataclass(frozen=True)
class ORPO(Objective):
    """ORPO's pair term, ``[B]``: ``-lam * log sigmoid(w.log_odds - l.log_odds)``; the anchor is ``-w.avg``.

    The pair term is a penalty on top of supervised fine-tuning rather than a likelihood of labels, so there is no
    ``label_smoothing``.
    """

    name = "orpo"
    paper = "Hong, Lee, Thorne 2024, arXiv 2403.07691, eqs. 6 and 7"
    average_logps = True
    lam: Annotated[float, NON_NEGATIVE, "Weight of the odds-ratio term."] = 0.1

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return -self.lam * F.logsigmoid(w.log_odds - l.log_odds)

    def anchor(self, w: Responses) -> Tensor:
        return -w.avg

    def implicit_reward(self, y: Responses) -> Tensor:
        return y.log_odds  # the quantity compared in the sigmoid


@dataclass(frozen=True)
class SLiCHF(Objective):
    """SLiC-HF's pair term, ``[B]``: ``relu(delta - w.logp + l.logp)``; the anchor is ``-lam * w.logp``.

    The paper anchors on the target of its fine-tuning data. Preference pairs have no such target, so the chosen
    response takes its place, as in the table of the SimPO paper.
    """

    name = "slic_hf"
    paper = "Zhao et al. 2023, arXiv 2305.10425"
    delta: Annotated[float, NON_NEGATIVE, "Target margin between the log-probabilities, in nats."] = 1.0
    lam: AnchorWeight = 1.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return torch.relu(self.delta - w.logp + l.logp)

    def anchor(self, w: Responses) -> Tensor:
        return -self.lam * w.logp

    def implicit_reward(self, y: Responses) -> Tensor:
        return y.logp  # the quantity compared in the margin


@dataclass(frozen=True)
class RRHF(Objective):
    """RRHF's pair term, ``[B]``: ``relu(l.avg - w.avg)``; the anchor is ``-lam * w.logp``.

    ``lam`` comes from the table of the SimPO paper; the RRHF paper fixes it at 1.
    """

    name = "rrhf"
    paper = "Yuan et al. 2023, arXiv 2304.05302"
    average_logps = True
    lam: AnchorWeight = 1.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return torch.relu(l.avg - w.avg)

    def anchor(self, w: Responses) -> Tensor:
        return -self.lam * w.logp

    def implicit_reward(self, y: Responses) -> Tensor:
        return y.avg  # the quantity compared in the ranking


@dataclass(frozen=True)
class RePO(Objective):
    """RePO, ``[B]``: ``relu(gamma - (w.avg - l.avg))``, the limit of SimPO for an infinite beta."""

    name = "repo"
    paper = "Wu et al. 2025, arXiv 2503.07426, eq. 6"
    average_logps = True
    gamma: Annotated[float, NON_NEGATIVE, "Target margin between the average log-probabilities, in nats."] = 0.4

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return torch.relu(self.gamma - (w.avg - l.avg))

    def implicit_reward(self, y: Responses) -> Tensor:
        return y.avg  # the quantity compared in the margin


# ---- Objectives that compare the policy with a reference.


@dataclass(frozen=True)
class LogRatioObjective(Objective):
    """Base class of objectives with DPO's implicit reward, ``beta * y.ratio``, ``[B]``."""

    needs: ClassVar[tuple[str, ...]] = ("reference",)
    beta: Beta = 0.1

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * y.ratio


@dataclass(frozen=True)
class DPO(LogRatioObjective):
    """DPO, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio))``."""

    name = "dpo"
    paper = "Rafailov et al. 2023, arXiv 2305.18290, eq. 7"
    label_smoothing: LabelSmoothing = 0.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return preference_nll(self.beta * (w.ratio - l.ratio), self.label_smoothing)


@dataclass(frozen=True)
class NormalizedDPO(DPO):
    """Length-normalized DPO, ``[B]``: ``-log sigmoid(beta * (w.avg_ratio - l.avg_ratio))``, with the beta of Tulu 3."""

    name = "dpo_norm"
    paper = "Lambert et al. 2024, arXiv 2411.15124"
    average_logps = True
    beta: Beta = 5.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return preference_nll(self.beta * (w.avg_ratio - l.avg_ratio), self.label_smoothing)

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.beta * y.avg_ratio


@dataclass(frozen=True)
class RDPO(DPO):
    """R-DPO, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio) + alpha * (w.length - l.length))``.

    If the chosen response is the longer one, the pair counts as partly won from the start and teaches less. With the
    opposite sign, which also appears in the literature, it would teach more. The reward is DPO's, without the lengths:
    training does not change them, so including them would make the accuracy describe the data instead of the model.
    """

    name = "r_dpo"
    paper = "Park et al. 2024, arXiv 2403.19159"
    alpha: Annotated[float, NON_NEGATIVE, "Weight of the length difference."] = 0.05

    def pair(self, w: Responses, l: Responses) -> Tensor:
        margin = self.beta * (w.ratio - l.ratio) + self.alpha * (w.length - l.length)
        return preference_nll(margin, self.label_smoothing)


@dataclass(frozen=True)
class DPOP(DPO):
    """DPO-Positive, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio - lam * relu(-w.ratio)))``.

    The penalty applies while the chosen response is less likely than under the reference. The defaults are from section
    5 of the paper.
    """

    name = "dpop"
    paper = "Pal et al. 2024, arXiv 2402.13228"
    beta: Beta = 0.3
    lam: Annotated[float, NON_NEGATIVE, "Weight of the penalty on chosen responses that lose probability."] = 50.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        margin = self.beta * (w.ratio - l.ratio - self.lam * torch.relu(-w.ratio))
        return preference_nll(margin, self.label_smoothing)


@dataclass(frozen=True)
class ChiPO(DPO):
    """ChiPO, ``[B]``: ``-log sigmoid(clip(r(w) - r(l), 2 * r_max))`` with ``r(y) = beta * (exp(y.ratio) + y.ratio)``.

    Chi-squared preference optimization is DPO with the link ``phi(z) = z + log z`` applied to the probability ratio
    ``z``, which mixes chi-squared regularization into the KL regularization. Margins beyond ``2 * r_max`` in either
    direction are clipped and have no gradient. ``beta * exp(ratio)`` is capped at ``exp(20)`` to prevent overflow.
    """

    name = "chi_po"
    paper = "Huang et al. 2024, arXiv 2407.13399, algorithm 1"
    beta: Beta = 0.05
    r_max: Annotated[float, POSITIVE, "Largest reward; margins are clipped at twice this value."] = 2.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        margin = self.implicit_reward(w) - self.implicit_reward(l)
        return preference_nll(margin.clamp(-2 * self.r_max, 2 * self.r_max), self.label_smoothing)

    def implicit_reward(self, y: Responses) -> Tensor:
        scale = torch.as_tensor(self.beta, dtype=y.logp.dtype)
        return (scale.log() + y.ratio).clamp(max=20).exp() + self.beta * y.ratio


@dataclass(frozen=True)
class FDPO(Objective):
    """f-DPO, ``[B]``: ``-log sigmoid(r(w) - r(l))`` with ``r(y) = beta * f'(exp(y.ratio))`` for an f-divergence.

    DPO is regularized by the reverse KL divergence, where ``f'`` is the logarithm. Here ``f'(u)`` is ``log(2u / (1 +
    u))`` for ``js``, ``1 - 1 / u`` for ``forward_kl``, and ``(1 - u**-alpha) / alpha`` for ``alpha``, which is DPO's in
    the limit ``alpha = 0`` and the forward KL's at ``alpha = 1``. Where needed, a constant makes ``r`` 0 for the
    reference; it does not affect the loss. ``u**-alpha`` is capped at ``exp(20)`` to prevent overflow.
    """

    name = "f_dpo"
    paper = "Wang et al. 2023, arXiv 2309.16240, table 1"
    needs = ("reference",)
    divergence: Annotated[Literal["js", "forward_kl", "alpha"], "Divergence from the reference."] = "js"
    alpha: Annotated[float, OPEN_UNIT, "Order of the alpha divergence; small values are close to DPO."] = 0.5
    beta: Beta = 0.1
    label_smoothing: LabelSmoothing = 0.0

    def pair(self, w: Responses, l: Responses) -> Tensor:
        return preference_nll(self.implicit_reward(w) - self.implicit_reward(l), self.label_smoothing)

    def implicit_reward(self, y: Responses) -> Tensor:
        if self.divergence == "js":
            return self.beta * (math.log(2) + F.logsigmoid(y.ratio))
        order = 1.0 if self.divergence == "forward_kl" else self.alpha
        return self.beta * -torch.expm1((-order * y.ratio).clamp(max=20)) / order


@dataclass(frozen=True)
class IPO(Objective):
    """IPO, ``[B]``: ``(w.ratio - l.ratio - 1 / (2 * tau)) ** 2``.

    The paper sums over tokens; ``length_normalized=True`` uses the average over each response's tokens instead, as the
    authors recommend for language models.
    """

    name = "ipo"
    paper = "Azar et al. 2023, arXiv 2310.12036, eq. 17"
    needs = ("reference",)
    tau: Annotated[float, POSITIVE, "Strength of the regularization; the target margin is 1 / (2 tau)."] = 0.1
    length_normalized: Annotated[bool, "Divide a response's log-ratio by its length."] = False

    def pair(self, w: Responses, l: Responses) -> Tensor:
        gap = w.avg_ratio - l.avg_ratio if self.length_normalized else w.ratio - l.ratio
        return (gap - 1 / (2 * self.tau)).square()

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.tau * (y.avg_ratio if self.length_normalized else y.ratio)


@dataclass(frozen=True)
class KTO(LogRatioObjective):
    """KTO, ``[B]``: ``lam_w * sigmoid(z_ref - beta * w.ratio) + lam_l * sigmoid(beta * l.ratio - z_ref)``.

    ``1 - sigmoid(x)`` is written as ``sigmoid(-x)``. The table of the SimPO paper prints the second term with the
    opposite sign, which would raise rejected responses. ``z_ref`` ``[]`` is the :func:`reference_point` of the
    optimizer step, and 0 while the policy is the reference.
    """

    name = "kto"
    paper = "Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7"
    needs = ("reference", "z_ref")
    takes_unpaired = True
    aliases = {"desirable_weight": Alias("lam_w"), "undesirable_weight": Alias("lam_l")}  # noqa: RUF012
    lam_w: Annotated[float, NON_NEGATIVE, "Weight of chosen (desirable) responses."] = 1.0
    lam_l: Annotated[float, NON_NEGATIVE, "Weight of rejected (undesirable) responses."] = 1.0

    def pair(self, w: Responses, l: Responses, z_ref: Tensor | float = 0.0) -> Tensor:
        desirable = self.lam_w * torch.sigmoid(z_ref - self.beta * w.ratio)
        return desirable + self.lam_l * torch.sigmoid(self.beta * l.ratio - z_ref)

    def unpaired(self, y: Responses, label: Tensor, z_ref: Tensor | float = 0.0) -> Tensor:
        below = z_ref - self.beta * y.ratio
        return torch.where(label, self.lam_w * torch.sigmoid(below), self.lam_l * torch.sigmoid(-below))


def reference_point(mean_ratio: Tensor, beta: float) -> Tensor:
    """Compute KTO's ``z_ref``, ``[]``: ``beta * max(mean_ratio, 0)``, detached.

    Args:
        mean_ratio: ``[]`` mean of ``ratio`` over the whole optimizer step, for responses paired with mismatched
            prompts. It estimates KL(policy || reference), which is never negative.
        beta: KTO's hyperparameter.
    """
    return beta * mean_ratio.detach().clamp(min=0)


_ALL = (SimPO, DPO, IPO, CPO, KTO, ORPO, RDPO, SLiCHF, RRHF, NormalizedDPO, AlphaPO, SimPER, DPOP, RePO, ChiPO, FDPO)
OBJECTIVES.update({objective.name: objective() for objective in _ALL})

# ---- Losses for reward models, which assign one number to a prompt with its response.


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Compute the negative log-likelihood of preferences, ``[N]``, from the rewards ``[N]`` of both responses.

    ``-logsigmoid(chosen - rejected - margin)``. Ouyang et al. 2022, arXiv 2203.02155, equation 1, where the weight
    ``1 / C(K, 2)`` averages over the pairs of a prompt; the margin is from Touvron et al. 2023, arXiv 2307.09288,
    equation 2.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute ``(chosen + rejected)**2``, ``[N]``, which pulls the mean reward towards 0.

    Preferences determine rewards only up to an additive constant. Eisenstein et al. 2023, arXiv 2312.09244.
    """
    return (chosen + rejected) ** 2
