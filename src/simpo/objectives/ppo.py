"""Implements PPO for language models (Schulman et al. 2017; Ouyang et al. 2022), in the order of its steps.

An answer is an episode. The state is the prompt with the answer so far, the action is the next token, and a value
function ``V`` predicts the future rewards. A *rollout* is a set of answers sampled by the policy and scored by an
annotator. From there:

1. :class:`ScoreScale` shifts, scales and clips the scores.
2. :func:`token_rewards` gives an answer's last token its score, and every token a penalty for drifting from the initial
   model.
3. :func:`gae` computes from rewards and values how much better each token was than ``V`` expected, its *advantage*.
   :meth:`PPO.estimate` does 2 and 3. The advantages of a rollout are then scaled to mean 0 and variance 1.
4. For several epochs and minibatches, optimizer steps minimize
   :meth:`~simpo.objectives.policy_gradient.PolicyGradient.loss`, which raises the probability of tokens with a positive
   advantage while keeping the policy near the one that sampled, plus ``value_weight`` times :func:`value_loss`.
5. :func:`adapt_kl_coefficient` sets the KL coefficient of the next rollout.

Shapes: ``S`` tokens of ``R`` answers, one answer after another; ``segment`` ``[S]`` is the answer of each token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simpo.objectives.policy_gradient import sum_by, whiten

# ---- 1. Scores.


class ScoreScale(NamedTuple):
    """Scores rescaled to mean 0 and standard deviation 1 on the initial model's answers.

    Ziegler et al. 2019, arXiv 1909.08593, section 2.1. Unlike running statistics, the two numbers are fixed for the
    whole run, so the target of the optimization does not move.
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, scores: Tensor) -> ScoreScale:
        """Fit to the ``scores`` ``[R]`` of the initial model's answers; raises ValueError if they are all equal."""
        if scores.min() == scores.max():  # the standard deviation may be a rounding error instead of 0
            raise ValueError(f"all scores are {scores[0].item():g}, so they cannot be normalized")
        return cls(scores.mean().item(), scores.std(unbiased=False).item())

    def apply(self, score: float, clip: float | None = None) -> float:
        """Scale a score, and clip it to the range from ``-clip`` to ``clip``."""
        scaled = (score - self.mean) / self.std
        return scaled if clip is None else min(max(scaled, -clip), clip)


# ---- 2. Rewards.


def token_rewards(scores: Tensor, penalty: Tensor, segment: Tensor) -> Tensor:
    """Compute rewards ``[S]``: each token's ``-penalty`` ``[S]``, plus an answer's score ``[R]`` at its last token.

    Ouyang et al. 2022, arXiv 2203.02155, equation 2.
    """
    last = torch.ones_like(segment, dtype=torch.bool)
    last[:-1] = segment[1:] != segment[:-1]
    return torch.where(last, scores[segment] - penalty, -penalty)


# ---- 3. Advantages.


def gae(rewards: Tensor, values: Tensor, segment: Tensor, *, discount: float, lam: float) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns, both ``[S]``, by generalized advantage estimation.

    ``delta_t = r_t + discount * V_{t+1} - V_t`` and ``A_t = delta_t + discount * lam * A_{t+1}``, with a value of 0
    after an answer's last token. The returns ``A_t + V_t`` are the targets of ``V``. Schulman et al. 2016, arXiv
    1506.02438, equation 16.

    Args:
        rewards: ``[S]`` reward of each token.
        values: ``[S]`` value of the state in which each token was chosen.
        segment: ``[S]`` answer of each token, in ascending order.
        discount: the paper's gamma.
        lam: 0 trusts the values (one-step differences), 1 trusts the rewards (returns minus values).
    """
    count = int(segment[-1]) + 1
    lengths = sum_by(torch.ones_like(segment), segment, count)
    position = torch.arange(len(segment), device=segment.device) - (lengths.cumsum(0) - lengths)[segment]
    # One row per answer, so that the recursion handles all answers at once. Padding comes after the last token, with
    # rewards and values of 0, so it contributes nothing to the tokens before it.
    grid_rewards, grid_values = rewards.new_zeros(2, count, int(lengths.max()) + 1)
    grid_rewards[segment, position], grid_values[segment, position] = rewards, values
    grid_advantages, next_advantage = torch.zeros_like(grid_rewards), rewards.new_zeros(count)
    for t in range(grid_advantages.shape[1] - 2, -1, -1):
        delta = grid_rewards[:, t] + discount * grid_values[:, t + 1] - grid_values[:, t]
        next_advantage = delta + discount * lam * next_advantage
        grid_advantages[:, t] = next_advantage
    advantage = grid_advantages[segment, position]
    return advantage, advantage + values


# ---- 4. The value function's loss.


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Compute ``max((V - R)**2, (clip(V, V_old - clip, V_old + clip) - R)**2) / 2``, ``[S]``; 0 for NaN returns.

    The clipping is not in the PPO paper but in its implementations (Huang et al. 2024, arXiv 2403.17031).
    """
    unknown = returns.isnan()
    returns = torch.where(unknown, values.detach(), returns)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).masked_fill(unknown, 0)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Compute ``1 - var(returns - values) / var(returns)``: 1 for perfect values, 0 for constant ones.

    Tokens with a NaN return do not count. The result is NaN if all returns are equal.
    """
    valid = ~returns.isnan()
    values, returns = values[valid], returns[valid]
    if not len(returns) or returns.min() == returns.max():
        return math.nan
    return (1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)).item()


# ---- 5. The KL coefficient.


def adapt_kl_coefficient(coefficient: float, measured: float, answers: int, *, target: float, horizon: int) -> float:
    """Return the coefficient after a rollout: higher if the divergence was above its target, lower if below.

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2, with the horizon of their code.

    Args:
        coefficient: the coefficient during the rollout.
        measured: mean divergence per answer in the rollout, in nats.
        answers: number of answers in the rollout.
        target: the desired divergence.
        horizon: number of answers over which the coefficient changes by a factor of at most about ``e ** 0.2``; must be
            more than a fifth of ``answers``, or the coefficient could become negative.
    """
    error = min(max(measured / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)


# ---- All steps together.


@dataclass(frozen=True)
class PPO:
    """The part of PPO that other policy gradients lack; the fields are its hyperparameters.

    Attributes:
        discount: discount factor for later rewards; 1 in all published work on language models.
        gae_lambda: see :func:`gae`.
        whiten_rewards: divide the rollout's token rewards by their standard deviation, keeping their mean.
        value_clip: see :func:`value_loss`.
        value_weight: weight of the value loss relative to the policy loss.
    """

    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_rewards: bool = False
    value_clip: float = 0.2
    value_weight: float = 0.1

    def estimate(self, scores: Tensor, penalty: Tensor, values: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
        """Compute advantages and returns, ``[S]`` each, of a rollout's tokens.

        Args:
            scores: ``[R]`` scaled scores of the answers.
            penalty: ``[S]`` KL coefficient times each token's ``log(policy / initial model)``.
            values: ``[S]`` predictions of the value function when the rollout was sampled.
            segment: ``[S]`` answer of each token, in ascending order.
        """
        rewards = token_rewards(scores, penalty, segment)
        if self.whiten_rewards:
            rewards = whiten(rewards, keep_mean=True)
        return gae(rewards, values, segment, discount=self.discount, lam=self.gae_lambda)
