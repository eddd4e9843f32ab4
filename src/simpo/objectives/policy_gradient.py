"""Implements policy gradients: advantages, importance ratios and clipping, combined in the table ``POLICY_GRADIENTS``.

Shapes: ``S`` scored tokens of ``R`` responses, one response after another; ``segment`` ``[S]`` is the response of each
token, and ``group`` ``[R]`` is the prompt of each response. A loss is ``[R]``, and the loss of a step is its mean over
the step's responses, however they are split into micro-batches.

All entries are the same estimator, *baseline* x *ratio* x *normalization* with clipping. At the policy that sampled a
response ``y`` with advantage ``A``, the gradient of each is ``-A * grad log pi(y)``, up to the weighting of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

Baseline = Literal["batch", "leave_one_out", "group", "value"]
Ratio = Literal["token", "sequence", "sequence_mean"]
Normalization = Literal["sum", "length", "tokens", "constant"]
KLEstimator = Literal["k1", "k2", "k3", "exact"]

_EPSILON = 1e-6  # added to a standard deviation, so that equal rewards give advantages of 0


# ---- Sums and means over the tokens of a response, and over the responses of a prompt.


def sum_by(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sum the ``values`` ``[N]`` that share an ``index`` ``[N]``; ``[count]``."""
    return values.new_zeros(count).index_add(0, index, values)


def mean_by(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Average the ``values`` ``[N]`` that share an ``index`` ``[N]``; ``[count]``, 0 where there are none."""
    return sum_by(values, index, count) / sum_by(torch.ones_like(values), index, count).clamp(min=1)


# ---- Advantages.


def advantages(rewards: Tensor, group: Tensor, baseline: Baseline, *, scale_by_std: bool = False) -> Tensor:
    """Compute the advantages of whole responses, ``[R]``.

    Args:
        rewards: ``[R]`` rewards, including the KL penalty if there is one.
        group: ``[R]`` index of each response's prompt, from 0 without gaps.
        baseline: what to subtract: the mean of the ``batch``; the mean of the prompt's other responses
            (``leave_one_out``, Ahmadian et al. 2024, arXiv 2402.14740, equation 8); or the mean of all of the prompt's
            responses (``group``, Shao et al. 2024, arXiv 2402.03300, section 4.1.2).
        scale_by_std: divide by the standard deviation (``n - 1``) of the prompt's rewards, as GRPO does.

    Raises:
        ValueError: a prompt has a single response, which would be its own baseline, or the baseline is ``value``, which
            gives each token its own advantage (:mod:`simpo.objectives.ppo`).
    """
    if baseline == "value":
        raise ValueError("a value baseline gives each token its own advantage, not whole responses")
    if baseline == "batch":
        return rewards - rewards.mean()
    count = int(group.max()) + 1
    sizes = sum_by(torch.ones_like(rewards), group, count)[group]
    if (sizes < 2).any():
        raise ValueError(f"baseline {baseline!r} needs at least two responses per prompt")
    centered = rewards - mean_by(rewards, group, count)[group]
    if baseline == "leave_one_out":  # r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
        centered = centered * sizes / (sizes - 1)
    if scale_by_std:
        variance = sum_by((rewards - mean_by(rewards, group, count)[group]) ** 2, group, count)[group] / (sizes - 1)
        centered = centered / (variance.sqrt() + _EPSILON)
    return centered


def whiten(values: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Scale ``values`` ``[N]`` to mean 0 and (biased) variance 1; ``keep_mean`` changes only the variance."""
    white = (values - values.mean()) * torch.rsqrt(values.var(unbiased=False) + _EPSILON**2)
    return white + values.mean() if keep_mean else white


# ---- The distance from the reference model.


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate ``KL(policy || reference)`` from sampled tokens, ``[S]``; ``exact`` is not such an estimator.

    With ``d = logp - ref_logp``: ``k1 = d`` is unbiased and can be negative; ``k2 = d**2 / 2`` is biased, but its
    gradient is that of the divergence; ``k3 = exp(-d) - 1 + d`` is unbiased and never negative, but its gradient is
    biased. For a penalty on rewards, where only the value matters, use k1; for a loss term, use k2, or k3 as in GRPO.
    Schulman 2020, "Approximating KL divergence".
    """
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    assert estimator == "k3"
    return torch.expm1(-difference) + difference


# ---- Losses.


@dataclass(frozen=True)
class Rollout:
    """The inputs of a loss.

    Attributes:
        logp: ``[S]`` log-probabilities of the sampled tokens under the policy, with gradients.
        behavior_logp: ``[S]`` the same under the policy that sampled them.
        advantage: ``[S]`` advantage of each token; equal within a response if it belongs to the whole response.
        segment: ``[S]`` response of each token.
        responses: number of responses, ``R``.
    """

    logp: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    segment: Tensor
    responses: int


@dataclass(frozen=True)
class PolicyGradient:
    """A policy-gradient estimator; the fields are its hyperparameters.

    Attributes:
        paper: where it was published.
        baseline: what is subtracted from rewards; see :func:`advantages`.
        ratio: importance ratio of each ``token``; of the ``sequence``, which is their product; or ``sequence_mean``,
            the geometric mean of the tokens' ratios.
        normalization: how a response's tokens are combined: their ``sum``, or the sum divided by the response's
            ``length``, by the mean length in the step (``tokens``: all tokens count equally), or by a ``constant``.
        scale_by_std: whether advantages are divided by the standard deviation of a prompt's rewards.
        clip_low: ratios below ``1 - clip_low`` are clipped.
        clip_high: ratios above ``1 + clip_high`` are clipped.
    """

    paper: str
    baseline: Baseline
    ratio: Ratio
    normalization: Normalization
    scale_by_std: bool = False
    clip_low: Annotated[float, "positive"] = 0.2
    clip_high: Annotated[float, "positive"] = 0.2

    def loss(self, rollout: Rollout, *, denominator: float = 1.0) -> Tensor:
        """Compute ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``, combined over tokens to ``[R]``.

        Schulman et al. 2017, arXiv 1707.06347, equation 7.

        Args:
            rollout: log-probabilities and advantages.
            denominator: mean response length of the step for ``tokens``, or the constant for ``constant``.
        """
        ratio = self.ratios(rollout)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        token_loss = -torch.minimum(ratio * rollout.advantage, clipped * rollout.advantage)
        if self.ratio == "sequence":  # a response has one ratio, so its loss counts once instead of once per token
            return mean_by(token_loss, rollout.segment, rollout.responses)
        return self.aggregate_tokens(token_loss, rollout, denominator=denominator)

    def ratios(self, rollout: Rollout) -> Tensor:
        """Compute importance ratios ``pi(y) / behavior(y)``, ``[S]``; a sequence's ratio is repeated for its tokens."""
        difference = rollout.logp - rollout.behavior_logp
        if self.ratio == "sequence":
            difference = sum_by(difference, rollout.segment, rollout.responses)[rollout.segment]
        elif self.ratio == "sequence_mean":
            difference = mean_by(difference, rollout.segment, rollout.responses)[rollout.segment]
        return difference.exp()

    def clipped(self, rollout: Rollout) -> Tensor:
        """Return a mask ``[S]`` of the tokens whose gradient is removed by clipping."""
        ratio = self.ratios(rollout).detach()
        above = (ratio > 1 + self.clip_high) & (rollout.advantage > 0)
        below = (ratio < 1 - self.clip_low) & (rollout.advantage < 0)
        return above | below

    def aggregate_tokens(self, token_values: Tensor, rollout: Rollout, *, denominator: float = 1.0) -> Tensor:
        """Combine token values ``[S]``, such as a KL term, into response values ``[R]``; see ``normalization``."""
        if self.normalization == "length":
            return mean_by(token_values, rollout.segment, rollout.responses)
        total = sum_by(token_values, rollout.segment, rollout.responses)
        return total if self.normalization == "sum" else total / denominator


POLICY_GRADIENTS: dict[str, PolicyGradient] = {
    "reinforce": PolicyGradient("Williams 1992", "batch", "sequence", "sum"),
    "rloo": PolicyGradient("arXiv 2402.14740", "leave_one_out", "sequence", "sum"),
    "grpo": PolicyGradient("arXiv 2402.03300", "group", "token", "length", scale_by_std=True),
    "dr_grpo": PolicyGradient("arXiv 2503.20783", "group", "token", "constant"),
    "gspo": PolicyGradient(
        "arXiv 2507.18071", "group", "sequence_mean", "length", scale_by_std=True, clip_low=3e-4, clip_high=4e-4
    ),
    "ppo": PolicyGradient("arXiv 1707.06347", "value", "token", "tokens"),
}
