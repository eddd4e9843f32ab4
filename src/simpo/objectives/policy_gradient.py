"""Policy gradients: advantages, importance ratios and clipping, and the table ``POLICY_GRADIENTS`` that combines them.

Shapes: ``S`` scored tokens of ``R`` responses, one response after another; ``segment`` ``[S]`` is the response of each
token. A response belongs to a prompt, ``group`` ``[R]``. A loss is ``[R]``, and the loss of a step is its mean over the
step's responses, however they are split into micro-batches.

All rows are one estimator, *baseline* x *ratio* x *normalization* with clipping. At the policy that sampled a response
``y`` with advantage ``A``, the gradient of every row is ``-A * grad log pi(y)``, up to how tokens are weighted.
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
    """``[count]`` sums of ``values`` ``[N]`` that share an ``index`` ``[N]``."""
    return values.new_zeros(count).index_add(0, index, values)


def mean_by(values: Tensor, index: Tensor, count: int) -> Tensor:
    """``[count]`` means of ``values`` ``[N]`` that share an ``index`` ``[N]``; 0 where there are none."""
    return sum_by(values, index, count) / sum_by(torch.ones_like(values), index, count).clamp(min=1)


# ---- Advantages.


def advantages(rewards: Tensor, group: Tensor, baseline: Baseline, *, scale_by_std: bool = False) -> Tensor:
    """``[R]`` advantages of whole responses.

    Args:
        rewards: ``[R]`` rewards, including a penalty for the KL divergence if there is one.
        group: ``[R]`` index of each response's prompt, from 0 without gaps.
        baseline: what is subtracted: the mean of the ``batch``; the mean of the prompt's other responses
            (``leave_one_out``, Ahmadian et al. 2024, arXiv 2402.14740, equation 8); the mean of all of the prompt's
            responses (``group``, Shao et al. 2024, arXiv 2402.03300, section 4.1.2).
        scale_by_std: divide by the standard deviation (``n - 1``) of the prompt's rewards, as GRPO does.

    Raises:
        ValueError: a prompt has a single response, whose baseline would be its own reward, or the baseline is a
            ``value``, which gives every token an advantage of its own (:mod:`simpo.objectives.ppo`).
    """
    if baseline == "value":
        raise ValueError("a value baseline gives an advantage to each token, not to a whole response")
    if baseline == "batch":
        return rewards - rewards.mean()
    count = int(group.max()) + 1
    sizes = sum_by(torch.ones_like(rewards), group, count)[group]
    if (sizes < 2).any():
        raise ValueError(f"baseline {baseline!r} needs at least two responses to a prompt")
    centered = rewards - mean_by(rewards, group, count)[group]
    if baseline == "leave_one_out":  # r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
        centered = centered * sizes / (sizes - 1)
    if scale_by_std:
        variance = sum_by((rewards - mean_by(rewards, group, count)[group]) ** 2, group, count)[group] / (sizes - 1)
        centered = centered / (variance.sqrt() + _EPSILON)
    return centered


def whiten(values: Tensor, *, keep_mean: bool = False) -> Tensor:
    """``values`` ``[N]`` with mean 0 and variance 1 (biased); with ``keep_mean`` they are only scaled around it."""
    white = (values - values.mean()) * torch.rsqrt(values.var(unbiased=False) + _EPSILON**2)
    return white + values.mean() if keep_mean else white


# ---- The distance from the reference model.


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: KLEstimator) -> Tensor:
    """``[S]`` estimates of ``KL(policy || reference)`` from sampled tokens; ``exact`` cannot be one of them.

    With ``d = logp - ref_logp``: ``k1 = d`` is unbiased and can be negative; ``k2 = d**2 / 2`` is biased, but its
    gradient is that of the divergence; ``k3 = exp(-d) - 1 + d`` is unbiased and never negative, but its gradient is
    biased. As a penalty on rewards, where only the value matters, use k1; as a term of the loss, use k2, or k3 as GRPO
    does. Schulman 2020, "Approximating KL divergence".
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
        advantage: ``[S]`` advantage of each token; of a whole response, the same for all of its tokens.
        segment: ``[S]`` response of each token.
        responses: ``R``.
    """

    logp: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    segment: Tensor
    responses: int


@dataclass(frozen=True)
class PolicyGradient:
    """One estimator; the fields are its hyperparameters.

    Attributes:
        baseline: what is subtracted from rewards; see :func:`advantages`.
        scale_by_std: whether advantages are divided by the standard deviation of a prompt's rewards.
        ratio: importance ratio of each ``token``; of the ``sequence``, i.e. their product; or ``sequence_mean``, the
            geometric mean of the tokens' ratios.
        normalization: how the tokens of a response add up: their ``sum``; divided by the response's ``length``; by
            the mean length of the step's responses (``tokens``: every token counts alike); or by a ``constant``.
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
        """``[R]`` ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``, added up over tokens.

        Schulman et al. 2017, arXiv 1707.06347, equation 7.

        Args:
            rollout: log-probabilities and advantages.
            denominator: mean length of the step's responses for ``tokens``, the constant for ``constant``; else unused.
        """
        ratio = self.ratios(rollout)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        token_loss = -torch.minimum(ratio * rollout.advantage, clipped * rollout.advantage)
        if self.ratio == "sequence":  # one ratio for a response: its loss counts once, not once a token
            return mean_by(token_loss, rollout.segment, rollout.responses)
        return self.aggregate_tokens(token_loss, rollout, denominator=denominator)

    def ratios(self, rollout: Rollout) -> Tensor:
        """``[S]`` importance ratios ``pi(y) / behavior(y)``; a sequence's ratio is repeated for its tokens."""
        difference = rollout.logp - rollout.behavior_logp
        if self.ratio == "sequence":
            difference = sum_by(difference, rollout.segment, rollout.responses)[rollout.segment]
        elif self.ratio == "sequence_mean":
            difference = mean_by(difference, rollout.segment, rollout.responses)[rollout.segment]
        return difference.exp()

    def clipped(self, rollout: Rollout) -> Tensor:
        """``[S]`` bool, the tokens whose gradient clipping removes."""
        ratio = self.ratios(rollout).detach()
        above = (ratio > 1 + self.clip_high) & (rollout.advantage > 0)
        below = (ratio < 1 - self.clip_low) & (rollout.advantage < 0)
        return above | below

    def aggregate_tokens(self, token_values: Tensor, rollout: Rollout, *, denominator: float = 1.0) -> Tensor:
        """``[R]`` values of responses from those of tokens, ``[S]``, e.g. of a KL term; see ``normalization``."""
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
