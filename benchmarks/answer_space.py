"""An answer space that can be listed, and where each kind of online training ends in it.

A policy is a table: for every context (the tokens so far) the logits of the next token. docs/online.md derives the
fixed points, which are computed here without the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Advantages = Callable[[Tensor], Tensor]  # probabilities of all answers, [A], to their expected advantages, [A]


class AnswerSpace:
    """All answers of at most ``longest`` of ``tokens`` tokens, of which token 0 ends an answer.

    Attributes:
        answers: ``A`` tuples of tokens.
        contexts: ``C`` tuples of tokens, after which another one follows; the shortest first.
        tokens: ``[A, L]`` the tokens of each answer.
        context: ``[A, L]`` the number of the context of each token.
        mask: ``[A, L]`` bool, where an answer has a token.
    """

    def __init__(self, tokens: int, longest: int) -> None:
        self.answers: list[tuple[int, ...]] = []
        self.contexts: list[tuple[int, ...]] = []
        for length in range(1, longest + 1):
            for prefix in itertools.product(range(1, tokens), repeat=length - 1):
                self.contexts.append(prefix)
                self.answers += [(*prefix, last) for last in range(tokens) if last == 0 or length == longest]
        self.shape = (len(self.contexts), tokens)
        self.number = {answer: number for number, answer in enumerate(self.answers)}
        numbers = {context: number for number, context in enumerate(self.contexts)}
        self.tokens = torch.zeros(len(self.answers), longest, dtype=torch.long)
        self.context, self.mask = self.tokens.clone(), self.tokens.bool()
        for row, answer in enumerate(self.answers):
            for place, token in enumerate(answer):
                self.tokens[row, place], self.mask[row, place] = token, True
                self.context[row, place] = numbers[answer[:place]]

    def token_logps(self, logits: Tensor) -> Tensor:
        """``[A, L]`` log-probabilities of all answers' tokens under ``logits`` ``[C, V]``; 0 where there is none."""
        return torch.log_softmax(logits, -1)[self.context, self.tokens] * self.mask

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[A]`` probabilities of all answers."""
        return self.token_logps(logits).sum(-1).exp()

    def means(self, logits: Tensor, values: Tensor) -> Tensor:
        """``[C, V]`` means of ``values`` ``[A]`` of the answers that continue a context with a token."""
        probabilities = self.probabilities(logits)
        pairs = (self.context * self.shape[1] + self.tokens)[self.mask]

        def total(of: Tensor) -> Tensor:
            spread = of[:, None].expand(self.mask.shape)[self.mask]
            return torch.zeros(self.shape[0] * self.shape[1], dtype=of.dtype).index_add(0, pairs, spread)

        return (total(probabilities * values) / total(probabilities)).view(self.shape)


def distance(found: Tensor, expected: Tensor) -> float:
    """The total variation between two distributions over all answers, ``[A]``."""
    return 0.5 * (found - expected).abs().sum().item()


def optimum(space: AnswerSpace, start: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """``[A]`` ``pi_ref * exp(r / beta) / Z``, the maximum of ``E[r] - beta * KL(pi || pi_ref)``."""
    return torch.softmax(space.token_logps(start).sum(-1) + rewards / beta, 0)


def group_advantages(rewards: Tensor, k: int, *, draws: int = 2000) -> Advantages:
    """The expected advantages of GRPO: the reward minus the mean of ``k`` answers over their standard deviation.

    The other ``k - 1`` answers are drawn ``draws`` times, always with the same random numbers.
    """

    def advantages(probabilities: Tensor) -> Tensor:
        uniform = torch.rand(draws, k - 1, generator=torch.Generator().manual_seed(0), dtype=rewards.dtype)
        others = torch.searchsorted(probabilities.cumsum(0), uniform).clamp(max=len(rewards) - 1)
        total, squares = rewards[others].sum(1), (rewards[others] ** 2).sum(1)  # [draws]
        own = rewards[:, None]
        mean = (own + total) / k
        variance = (own**2 + squares - k * mean**2).clamp(min=0) / (k - 1)
        return ((own - mean) / (variance.sqrt() + 1e-6)).mean(1)

    return advantages


def fixed_point_with_kl_in_the_loss(
    space: AnswerSpace,
    start: Tensor,
    advantages: Advantages,
    beta: float,
    estimator: Literal["k2", "k3"],
    *,
    by_length: bool = False,
    iterations: int = 60,
) -> Tensor:
    """``[C, V]`` log-probabilities where the expected gradient of a policy gradient with a KL term in its loss is 0.

    Args:
        space: of the answers.
        start: ``[C, V]`` logits of the reference.
        advantages: of the answers under a policy; a baseline, the same for all answers, makes no difference.
        beta: the coefficient of the KL term.
        estimator: of the KL term.
        by_length: whether tokens are divided by the length of their answer, as GRPO does.
        iterations: of ``policy <- what its own advantages and continuations ask for``, damped.
    """
    reference = torch.log_softmax(start, -1)
    policy, weights = reference, torch.ones(len(space.answers), dtype=start.dtype)
    if by_length:
        weights = 1 / space.mask.sum(-1).to(start.dtype)
    for _ in range(iterations):
        gain = space.means(policy, weights * advantages(space.probabilities(policy)))
        cost = beta * space.means(policy, weights)
        low, high = gain.min(-1, keepdim=True).values, gain.max(-1, keepdim=True).values
        if estimator == "k2":  # gain - cost * log(pi / ref) is the same for all tokens
            found = _normalized(lambda c, g=gain, w=cost: reference + (g - c) / w, low, high)
        else:  # gain - cost * (1 - ref / pi) is the same for all tokens
            low = torch.maximum(low, (gain - cost).max(-1, keepdim=True).values + 1e-12)
            found = _normalized(lambda c, g=gain, w=cost: reference + w.log() - (w + c - g).log(), low, high)
        policy = torch.log_softmax(0.5 * (policy + found), -1)
    return policy


def _normalized(logp: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """``[C, V]`` ``logp(c)`` at the ``c`` ``[C, 1]`` between ``low`` and ``high`` where the probabilities add up to 1.

    They fall with ``c``: where its terms are 0, a probability is that of the reference.
    """
    for _ in range(60):
        middle = (low + high) / 2
        above = logp(middle).exp().sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return logp((low + high) / 2)
