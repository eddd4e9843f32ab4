"""An answer space small enough to enumerate, and the fixed point of each kind of online training in it.

A policy is a table of next-token logits, one row per context (the tokens so far). docs/online.md derives the fixed
points; they are computed here without using the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Advantages = Callable[[Tensor], Tensor]  # maps answer probabilities [A] to expected advantages [A]


class AnswerSpace:
    """All answers of up to ``max_length`` tokens over a vocabulary of ``tokens``; token 0 ends an answer.

    Attributes:
        answers: ``A`` tuples of tokens.
        contexts: ``C`` token prefixes that another token can follow, shortest first.
        tokens: ``[A, L]`` tokens of each answer.
        context: ``[A, L]`` index of each token's context.
        mask: ``[A, L]`` bool, True where an answer has a token.
    """

    def __init__(self, tokens: int, max_length: int) -> None:
        self.answers: list[tuple[int, ...]] = []
        self.contexts: list[tuple[int, ...]] = []
        for length in range(1, max_length + 1):
            for prefix in itertools.product(range(1, tokens), repeat=length - 1):
                self.contexts.append(prefix)
                self.answers += [(*prefix, last) for last in range(tokens) if last == 0 or length == max_length]
        self.shape = (len(self.contexts), tokens)
        self.index_of = {answer: index for index, answer in enumerate(self.answers)}
        context_index = {context: index for index, context in enumerate(self.contexts)}
        self.tokens = torch.zeros(len(self.answers), max_length, dtype=torch.long)
        self.context, self.mask = self.tokens.clone(), self.tokens.bool()
        for row, answer in enumerate(self.answers):
            for position, token in enumerate(answer):
                self.tokens[row, position], self.mask[row, position] = token, True
                self.context[row, position] = context_index[answer[:position]]

    def token_logps(self, logits: Tensor) -> Tensor:
        """Return the token log-probabilities ``[A, L]`` of all answers under ``logits`` ``[C, V]``, 0 for padding."""
        return torch.log_softmax(logits, -1)[self.context, self.tokens] * self.mask

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities ``[A]`` of all answers."""
        return self.token_logps(logits).sum(-1).exp()

    def conditional_means(self, logits: Tensor, values: Tensor) -> Tensor:
        """Return ``[C, V]``: the expectation of ``values`` ``[A]`` given each context and its next token."""
        probabilities = self.probabilities(logits)
        pairs = (self.context * self.shape[1] + self.tokens)[self.mask]

        def total(summands: Tensor) -> Tensor:
            per_token = summands[:, None].expand(self.mask.shape)[self.mask]
            return torch.zeros(self.shape[0] * self.shape[1], dtype=summands.dtype).index_add(0, pairs, per_token)

        return (total(probabilities * values) / total(probabilities)).view(self.shape)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Return the total variation distance between two distributions over all answers, ``[A]`` each."""
    return 0.5 * (p - q).abs().sum().item()


def optimum(space: AnswerSpace, start: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return ``pi_ref * exp(r / beta) / Z`` ``[A]``, the policy that maximizes ``E[r] - beta * KL(pi || pi_ref)``."""
    return torch.softmax(space.token_logps(start).sum(-1) + rewards / beta, 0)


def group_advantages(rewards: Tensor, k: int, *, draws: int = 2000) -> Advantages:
    """Return a function for GRPO's expected advantages: the reward standardized over a group of ``k`` answers.

    The other ``k - 1`` answers are sampled ``draws`` times, always with the same random numbers.
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
    """Return the policy (log-probabilities ``[C, V]``) at which a policy gradient with a KL loss term has mean 0.

    Args:
        space: the answer space.
        start: ``[C, V]`` logits of the reference.
        advantages: expected advantages under a policy; a constant baseline makes no difference.
        beta: coefficient of the KL term.
        estimator: estimator of the KL term.
        by_length: whether each token's loss is divided by the length of its answer, as in GRPO.
        iterations: number of damped fixed-point iterations.
    """
    reference = torch.log_softmax(start, -1)
    policy, weights = reference, torch.ones(len(space.answers), dtype=start.dtype)
    if by_length:
        weights = 1 / space.mask.sum(-1).to(start.dtype)
    for _ in range(iterations):
        gain = space.conditional_means(policy, weights * advantages(space.probabilities(policy)))
        cost = beta * space.conditional_means(policy, weights)
        low, high = gain.min(-1, keepdim=True).values, gain.max(-1, keepdim=True).values
        if estimator == "k2":  # gain - cost * log(pi / ref) is the same for all tokens
            update = _normalized(lambda c, g=gain, w=cost: reference + (g - c) / w, low, high)
        else:  # gain - cost * (1 - ref / pi) is the same for all tokens
            low = torch.maximum(low, (gain - cost).max(-1, keepdim=True).values + 1e-12)
            update = _normalized(lambda c, g=gain, w=cost: reference + w.log() - (w + c - g).log(), low, high)
        policy = torch.log_softmax(0.5 * (policy + update), -1)
    return policy


def _normalized(logp: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return ``logp(c)`` ``[C, V]`` for the ``c`` ``[C, 1]`` in ``[low, high]`` at which each row sums to 1.

    Found by bisection: the probabilities decrease with ``c``.
    """
    for _ in range(60):
        middle = (low + high) / 2
        above = logp(middle).exp().sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return logp((low + high) / 2)
