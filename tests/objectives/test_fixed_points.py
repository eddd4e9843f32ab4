"""Fixed points of online training: the policy against ``pi_ref * exp(r / beta) / Z`` in an enumerable answer space.

A policy is a table of logits for every context. There are 1,111 answers: up to three of eleven tokens, the first of
which ends an answer. Answers are sampled from the policy at every step, and advantages and losses come from the
package. docs/online.md derives the fixed points.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from benchmarks.answer_space import (
    AnswerSpace,
    fixed_point_with_kl_in_the_loss,
    group_advantages,
    optimum,
    total_variation,
)
from tests.sampled import sampled

from simpo.objectives import OBJECTIVES, Responses
from simpo.objectives.policy_gradient import POLICY_GRADIENTS, Rollout, advantages, kl_estimate, sum_by
from simpo.objectives.ppo import PPO, value_loss

TOKENS, LONGEST = 11, 3  # token 0 ends an answer
STEPS, GROUPS, K = 300, 128, 16
ANSWERS = AnswerSpace(TOKENS, LONGEST)
CONTEXTS = {context: number for number, context in enumerate(ANSWERS.contexts)}


@pytest.fixture(scope="module")
def world():
    """Logits of the start policy, ``[contexts, tokens]``, and a reward for every answer."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(CONTEXTS), TOKENS, generator=generator, dtype=torch.float64)
    rewards = 2 * torch.rand(len(ANSWERS.tokens), generator=generator, dtype=torch.float64) - 1
    assert len(rewards) == 1111
    return start, rewards


def trained(start, step_loss):
    """Return the logits after training; ``step_loss(logits, answers)`` is the loss of ``[GROUPS * K]`` samples."""
    torch.manual_seed(1)
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        probabilities = ANSWERS.token_logps(logits.detach()).sum(-1).exp()
        answers = torch.multinomial(probabilities, GROUPS * K, replacement=True)
        optimizer.zero_grad()
        step_loss(logits, answers).backward()
        optimizer.step()
        schedule.step()
    return logits.detach()


def policy_gradient_loss(name, beta, start, rewards, *, kl_in="reward", estimator="k1"):
    row, group = POLICY_GRADIENTS[name], torch.arange(GROUPS).repeat_interleave(K)
    reference = ANSWERS.token_logps(start)

    def loss(logits, answers):
        mask = ANSWERS.mask[answers]
        segment = torch.arange(len(answers)).repeat_interleave(mask.sum(-1))
        logp, ref_logp = ANSWERS.token_logps(logits)[answers][mask], reference[answers][mask]
        reward = rewards[answers]
        if kl_in == "reward":
            penalty = kl_estimate(logp.detach(), ref_logp, estimator)
            reward = reward - beta * sum_by(penalty, segment, len(answers))
        advantage = advantages(reward, group, row.baseline, scale_by_std=row.scale_by_std)
        rollout = Rollout(logp, logp.detach(), advantage[segment], segment, len(answers))
        losses = row.loss(rollout, denominator=LONGEST)
        if kl_in == "loss":
            losses = losses + beta * row.aggregate_tokens(
                kl_estimate(logp, ref_logp, estimator), rollout, denominator=LONGEST
            )
        return losses.mean()

    return loss


def ppo_loss(beta, start, rewards):
    """Return PPO's loss with the package's defaults and a table of values that has its own optimizer."""
    ppo, row, reference = PPO(), POLICY_GRADIENTS["ppo"], ANSWERS.token_logps(start)
    table = torch.zeros(len(start), dtype=start.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)

    def loss(logits, answers):
        mask, contexts = ANSWERS.mask[answers], ANSWERS.context[answers]
        segment = torch.arange(len(answers)).repeat_interleave(mask.sum(-1))
        logp, ref_logp = ANSWERS.token_logps(logits)[answers][mask], reference[answers][mask]
        values = table[contexts][mask]
        penalty = beta * kl_estimate(logp.detach(), ref_logp, "k1")
        advantage, returns = ppo.estimate(rewards[answers], penalty, values.detach(), segment)
        optimizer.zero_grad()
        value_loss(values, values.detach(), returns, clip=ppo.value_clip).mean().backward()
        optimizer.step()
        rollout = Rollout(logp, logp.detach(), advantage, segment, len(answers))
        return row.loss(rollout, denominator=1.0).mean()

    return loss


def dpo_loss(beta, start, rewards):
    """Return DPO's loss on pairs of sampled answers, preferred with Bradley-Terry probabilities."""
    objective = OBJECTIVES["dpo"].with_hyperparameters(beta=beta)
    reference, lengths = ANSWERS.token_logps(start).sum(-1), ANSWERS.mask.sum(-1).double()

    def loss(logits, answers):
        logp = ANSWERS.token_logps(logits).sum(-1)
        a, b = (Responses(logp[one], lengths[one], reference[one]) for one in answers.chunk(2))
        first, second = answers.chunk(2)
        p = torch.sigmoid(rewards[first] - rewards[second])
        return (p * objective.pair(a, b) + (1 - p) * objective.pair(b, a)).mean()

    return loss


def optimum_with_kl_in_the_loss(start, rewards, beta, estimator):
    """Compute each context's policy from the mean rewards of its continuations, from the last token to the first."""
    reference, policy = torch.softmax(start, -1), torch.zeros_like(start)
    value = {}
    for prefix in sorted(CONTEXTS, key=len, reverse=True):
        means = torch.stack(
            [
                rewards[ANSWERS.index_of[answer]] if answer in ANSWERS.index_of else value[answer]
                for answer in ((*prefix, token) for token in range(TOKENS))
            ]
        )
        own = reference[CONTEXTS[prefix]]
        if estimator == "k2":
            found = torch.softmax(own.log() + means / beta, 0)
        else:  # k3: beta * own / (c - means), with the c above all means for which this is a distribution
            low, high = means.max().item(), means.max().item() + beta * TOKENS
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (middle, high) if (beta * own / (middle - means)).sum() > 1 else (low, middle)
            found = beta * own / (high - means)
        policy[CONTEXTS[prefix]], value[prefix] = found, (found * means).sum()
    return ANSWERS.token_logps(policy.log()).sum(-1).exp()


@pytest.mark.parametrize(
    ("name", "beta"), itertools.product(["reinforce", "rloo", "dr_grpo", "dpo", "ppo"], [0.5, 1.0, 2.0])
)
def test_the_trained_policy_reaches_the_closed_form(world, name, beta):
    start, rewards = world
    expected = optimum(ANSWERS, start, rewards, beta)
    assert total_variation(ANSWERS.probabilities(start), expected) > 0.1
    losses = {"dpo": dpo_loss, "ppo": ppo_loss}
    loss = losses[name](beta, *world) if name in losses else policy_gradient_loss(name, beta, *world)
    # at the optimum, all advantages and gradients are 0, so sampling adds no noise
    assert total_variation(ANSWERS.probabilities(trained(start, loss)), expected) < 0.01


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_kl_in_the_loss_leads_to_a_different_policy(world, estimator, beta):
    start, rewards = world
    expected = optimum_with_kl_in_the_loss(start, rewards, beta, estimator)
    assert expected.sum() == pytest.approx(1)
    found = trained(start, policy_gradient_loss("dr_grpo", beta, *world, kl_in="loss", estimator=estimator))
    assert total_variation(ANSWERS.probabilities(found), expected) < 0.05


@pytest.mark.parametrize(("name", "beta"), sampled([("grpo", 0.5), ("gspo", 1.0), ("grpo", 2.0)], kept=[("grpo", 0.5)]))
def test_standardized_advantages_lead_to_their_own_fixed_point(world, name, beta):
    start, rewards = world
    advantage = group_advantages(rewards, K, draws=500)
    expected = ANSWERS.probabilities(
        fixed_point_with_kl_in_the_loss(ANSWERS, start, advantage, beta, "k3", by_length=True)
    )
    found = trained(start, policy_gradient_loss(name, beta, *world, kl_in="loss", estimator="k3"))
    assert total_variation(ANSWERS.probabilities(found), expected) < 0.05
    assert total_variation(optimum(ANSWERS, start, rewards, beta), expected) > 0.05


def test_the_fixed_points_differ(world):
    start, rewards = world
    soft = optimum(ANSWERS, start, rewards, 0.5)
    for estimator in ("k2", "k3"):
        other = optimum_with_kl_in_the_loss(start, rewards, 0.5, estimator)
        assert total_variation(soft, other) > 0.02
        iterated = fixed_point_with_kl_in_the_loss(ANSWERS, start, lambda _: rewards, 0.5, estimator, iterations=40)
        assert total_variation(ANSWERS.probabilities(iterated), other) < 1e-6
