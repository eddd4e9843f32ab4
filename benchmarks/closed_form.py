"""Online training with 1,111 possible answers, compared with the policy it should converge to.

    python -m benchmarks.closed_form --output_dir runs/closed-form

``OnlineTrainer`` trains a small Llama, as in ``simpo online``, on answers it samples itself; every answer has a random
score. The probabilities of all answers are then compared with the objective's fixed point, derived in docs/online.md.
The total variation distance is reported before and after training. Runs already in ``figures.json`` are not repeated.

``--exact`` trains the same network with the same losses on the exact expectation over all answers instead. The
difference between the two is sampling noise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging as hf_logging

from benchmarks.answer_space import (
    Advantages,
    AnswerSpace,
    fixed_point_with_kl_in_the_loss,
    group_advantages,
    optimum,
    total_variation,
)
from benchmarks.letters import letter_model, letter_tokenizer
from benchmarks.measurement_cache import MeasurementCache
from simpo.objectives.policy_gradient import POLICY_GRADIENTS, KLEstimator, Rollout, kl_estimate
from simpo.training.configs import OnlineConfig
from simpo.training.online import OnlineTrainer
from simpo.training.rollouts import AnsweredPrompt

_PROMPT = [1]
_ANSWERS_PER_PROMPT = 16
_LEARNING_RATE, _ADAM_BETA2 = 1e-3, 0.99


@dataclass(frozen=True)
class Method:
    """A training method and its fixed point.

    Attributes:
        settings: ``simpo online`` keys, except for ``beta``.
        kl_in_loss: estimator of the KL term in the loss, or None if the fixed point is the optimum.
        scaled: whether advantages are divided by their standard deviation and token losses by the answer's length.
    """

    settings: dict[str, Any]
    kl_in_loss: Literal["k2", "k3"] | None = None
    scaled: bool = False

    def options(self, beta: float) -> dict[str, Any]:
        """Return all keys, with ``beta`` under the name this method uses."""
        return self.settings | {"beta" if self.settings["objective"] == "dpo" else "kl_coef": beta}

    def advantages(self, task: Task, k: int) -> Advantages:
        """Return the expected advantages, up to a constant, with ``k`` answers per prompt."""
        return group_advantages(task.rewards, k) if self.scaled else lambda _: task.rewards

    def fixed_point(self, task: Task, beta: float, k: int) -> Tensor:
        """Return the probabilities ``[A]`` of all answers at the fixed point."""
        if self.kl_in_loss is None:
            return optimum(task.space, task.start, task.rewards, beta)
        policy = fixed_point_with_kl_in_the_loss(
            task.space, task.start, self.advantages(task, k), beta, self.kl_in_loss, by_length=self.scaled
        )
        return task.space.probabilities(policy)


METHODS = {
    "rloo": Method({"objective": "rloo"}),
    "grpo without std": Method({"objective": "dr_grpo", "kl_in": "reward"}),
    # whitening would blow up the advantages, which vanish at the optimum
    "ppo": Method({"objective": "ppo", "whiten_advantages": False, "value_learning_rate": 3e-3}),
    "dpo, exact probabilities": Method({"objective": "dpo", "soft_labels": True, "num_generations": 2}),
    "reinforce, k2 in the loss": Method({"objective": "reinforce", "kl_in": "loss", "kl_estimator": "k2"}, "k2"),
    "reinforce, k3 in the loss": Method({"objective": "reinforce", "kl_in": "loss"}, "k3"),
    "grpo": Method({"objective": "grpo"}, "k3", scaled=True),
    "gspo": Method({"objective": "gspo"}, "k3", scaled=True),
}


class Task:
    """A model that answers one prompt, and a score for each possible answer.

    Attributes:
        space: the answer space.
        model: the model that is trained.
        start: ``[C, V]`` its initial logits.
        rewards: ``[A]`` scores between -1 and 1.
    """

    def __init__(self, tokens: int, max_length: int, seed: int = 0) -> None:
        self.space = AnswerSpace(tokens, max_length)
        # this spread gives logits a standard deviation of about 1
        self.model = letter_model(tokens, layers=1, spread=0.12, seed=seed)
        self.rewards = 2 * torch.rand(len(self.space.answers), dtype=torch.float64) - 1
        self.start = self.logits().detach()

    def logits(self) -> Tensor:
        """Return the model's float64 logits ``[C, V]`` in every context."""
        longest = max(self.space.contexts, key=len)
        prefixes = [context for context in self.space.contexts if len(context) == len(longest)]
        rows = self.model(torch.tensor([[*_PROMPT, *prefix] for prefix in prefixes])).logits.double()
        known = {prefix[:n]: row[n] for prefix, row in zip(prefixes, rows, strict=True) for n in range(len(prefix) + 1)}
        return torch.stack([known[context] for context in self.space.contexts])

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """Return the probabilities ``[A]`` of all answers under the model."""
        return self.space.probabilities(self.logits())

    def score(self, answered: Sequence[AnsweredPrompt]) -> list[list[float]]:
        """Score sampled answers; this is the trainer's annotator."""
        return [[self.rewards[self.space.index_of[tuple(one.ids)]].item() for one in each.samples] for each in answered]

    def train(self, folder: Path, *, answers: int, k: int, steps: int, **settings: Any) -> Tensor:
        """Train on ``answers`` samples per step, ``k`` per prompt; return the probabilities ``[A]`` of all answers."""
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 100, "save_strategy": "no"}
        schedule = {"learning_rate": _LEARNING_RATE, "lr_scheduler_type": "cosine", "adam_beta2": _ADAM_BETA2}
        schedule |= {"max_grad_norm": 0.0}
        sampled = {"num_generations": k, "generation_batch_size": answers, "max_new_tokens": self.space.mask.shape[1]}
        args = OnlineConfig(
            str(folder),
            max_length=16,
            per_device_train_batch_size=answers // k,
            max_steps=steps,
            forward_path="padded",  # faster than the packed path for answers this short
            **quiet | schedule | sampled | settings,
        )
        # the same prompt many times, made distinct by whitespace that the tokenizer ignores
        rows = [{"prompt": "a" + " " * number} for number in range(answers // k)]
        trainer = OnlineTrainer(
            self.model, args, rows, processing_class=letter_tokenizer(self.space.shape[1]), annotator=self.score
        )
        trainer.train()
        return self.probabilities()

    def train_exactly(
        self, name: str, beta: float, advantages: Advantages, estimator: KLEstimator, steps: int
    ) -> Tensor:
        """Train on the exact expected on-policy loss; return the probabilities ``[A]`` of all answers.

        Args:
            name: the policy-gradient objective.
            beta: coefficient of the KL term in the loss.
            advantages: expected advantages of all answers under a policy.
            estimator: estimator of the KL term.
            steps: Adam steps, with the schedule used by :meth:`train`.
        """
        row, mask = POLICY_GRADIENTS[name], self.space.mask
        segment = torch.arange(len(mask)).repeat_interleave(mask.sum(-1))
        reference = self.space.token_logps(self.start)[mask]
        optimizer = torch.optim.Adam(self.model.parameters(), lr=_LEARNING_RATE, betas=(0.9, _ADAM_BETA2))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            token_logps = self.space.token_logps(self.logits())
            probabilities, logps = token_logps.detach().sum(-1).exp(), token_logps[mask]
            rollout = Rollout(logps, logps.detach(), advantages(probabilities)[segment], segment, len(mask))
            kl = row.aggregate_tokens(kl_estimate(logps, reference, estimator), rollout)
            losses = row.loss(rollout) + beta * kl
            optimizer.zero_grad()
            (probabilities * losses).sum().backward()
            optimizer.step()
            schedule.step()
        return self.probabilities()


def measure(
    name: str, beta: float, task: Task, *, answers: int, steps: int, exact: bool = False, **settings: Any
) -> dict[str, float]:
    """Train once and measure the distance from the fixed point, before and after, and from the optimum.

    ``exact`` requires a method with a KL term in the loss and ignores ``answers``.
    """
    method = METHODS[name]
    options = method.options(beta) | settings
    k = options.pop("num_generations", _ANSWERS_PER_PROMPT)
    expected = method.fixed_point(task, beta, k)
    best = optimum(task.space, task.start, task.rewards, beta)
    if exact:
        found = task.train_exactly(options["objective"], beta, method.advantages(task, k), method.kl_in_loss, steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = task.train(Path(folder), answers=answers, k=k, steps=steps, **options)
    return {
        "start": total_variation(task.space.probabilities(task.start), expected),
        "trained": total_variation(found, expected),
        "from the optimum": total_variation(found, best),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train every method at every beta and print the distances."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--betas", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--steps", type=int, default=250, help="at beta 1; scaled by 1 / beta otherwise (default 250)")
    parser.add_argument("--answers", type=int, default=256, help="per step (default 256)")
    parser.add_argument(
        "--exact", action="store_true", help="train on exact expectations (only methods with a KL loss)"
    )
    given = parser.parse_args(argv)
    methods = [name for name in given.rows if METHODS[name].kl_in_loss or not given.exact]
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    cache = MeasurementCache(given.output_dir / "figures.json")
    for name, beta in product(methods, given.betas):
        task, steps = Task(tokens=11, max_length=3), round(given.steps / beta)
        train = partial(measure, name, beta, task, answers=given.answers, steps=steps, exact=given.exact)
        label = f"{name} | {beta}" + " | exact" * given.exact
        found = cache.get_or_measure(label, train)
        print(f"{label}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
