"""Online training on 1,111 possible answers, against the policy where it must end.

    python -m benchmarks.closed_form --output_dir runs/closed-form

A small Llama is trained by ``OnlineTrainer``, as ``simpo online`` does it, on answers that it samples itself; every
answer has a random score. Then the probabilities of all answers are computed and compared with the fixed point of the
objective, which docs/online.md derives. The total variation between the two is reported, with that of the start. Runs
that are in ``figures.json`` are not repeated.

``--exact`` trains the same network on the expectation over all answers instead, with the losses of the package. The
difference between the two is the noise of sampling.
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
    distance,
    fixed_point_with_kl_in_the_loss,
    group_advantages,
    optimum,
)
from benchmarks.figures import Figures
from benchmarks.letters import letter_model, letter_tokenizer
from simpo.objectives.policy_gradient import POLICY_GRADIENTS, KLEstimator, Rollout, kl_estimate
from simpo.training.configs import OnlineConfig
from simpo.training.online import OnlineTrainer
from simpo.training.rollouts import AnsweredPrompt

_PROMPT = [1]
_ANSWERS_TO_A_PROMPT = 16
_LEARNING_RATE, _ADAM_BETA2 = 1e-3, 0.99


@dataclass(frozen=True)
class Row:
    """A way to train, and its fixed point.

    Attributes:
        settings: keys of ``simpo online``; ``beta`` is added.
        kl_in_loss: the estimator of the KL term of the loss; None if the fixed point is the optimum.
        scaled: whether advantages are divided by a standard deviation and tokens by the length of their answer.
    """

    settings: dict[str, Any]
    kl_in_loss: Literal["k2", "k3"] | None = None
    scaled: bool = False

    def options(self, beta: float) -> dict[str, Any]:
        """The keys with ``beta``."""
        return self.settings | {"beta" if self.settings["objective"] == "dpo" else "kl_coef": beta}

    def advantages(self, task: Task, k: int) -> Advantages:
        """The expected advantages of answers that are sampled ``k`` to a prompt, up to a constant."""
        return group_advantages(task.rewards, k) if self.scaled else lambda _: task.rewards

    def fixed_point(self, task: Task, beta: float, k: int) -> Tensor:
        """``[A]`` probabilities of all answers."""
        if self.kl_in_loss is None:
            return optimum(task.space, task.start, task.rewards, beta)
        policy = fixed_point_with_kl_in_the_loss(
            task.space, task.start, self.advantages(task, k), beta, self.kl_in_loss, by_length=self.scaled
        )
        return task.space.probabilities(policy)


ROWS = {
    "rloo": Row({"objective": "rloo"}),
    "grpo without std": Row({"objective": "dr_grpo", "kl_in": "reward"}),
    # whitening would blow up advantages that vanish at the optimum
    "ppo": Row({"objective": "ppo", "whiten_advantages": False, "value_learning_rate": 3e-3}),
    "dpo, exact probabilities": Row({"objective": "dpo", "soft_labels": True, "num_generations": 2}),
    "reinforce, k2 in the loss": Row({"objective": "reinforce", "kl_in": "loss", "kl_estimator": "k2"}, "k2"),
    "reinforce, k3 in the loss": Row({"objective": "reinforce", "kl_in": "loss"}, "k3"),
    "grpo": Row({"objective": "grpo"}, "k3", scaled=True),
    "gspo": Row({"objective": "gspo"}, "k3", scaled=True),
}


class Task:
    """A model that answers one prompt, and a score for each of its possible answers.

    Attributes:
        space: of the answers.
        model: the start.
        start: ``[C, V]`` its logits.
        rewards: ``[A]`` from -1 to 1.
    """

    def __init__(self, tokens: int, longest: int, seed: int = 0) -> None:
        self.space = AnswerSpace(tokens, longest)
        # with this spread logits have a standard deviation of about 1
        self.model = letter_model(tokens, layers=1, spread=0.12, seed=seed)
        self.rewards = 2 * torch.rand(len(self.space.answers), dtype=torch.float64) - 1
        self.start = self.logits().detach()

    def logits(self) -> Tensor:
        """``[C, V]`` float64 logits of the model in every context."""
        longest = max(self.space.contexts, key=len)
        prefixes = [context for context in self.space.contexts if len(context) == len(longest)]
        rows = self.model(torch.tensor([[*_PROMPT, *prefix] for prefix in prefixes])).logits.double()
        known = {prefix[:n]: row[n] for prefix, row in zip(prefixes, rows, strict=True) for n in range(len(prefix) + 1)}
        return torch.stack([known[context] for context in self.space.contexts])

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """``[A]`` probabilities of all answers under the model."""
        return self.space.probabilities(self.logits())

    def score(self, answered: Sequence[AnsweredPrompt]) -> list[list[float]]:
        """The annotator."""
        return [[self.rewards[self.space.number[tuple(one.ids)]].item() for one in each.samples] for each in answered]

    def train(self, folder: Path, *, answers: int, k: int, steps: int, **settings: Any) -> Tensor:
        """Train the model on ``answers`` of its own a step, ``k`` to a prompt; returns ``[A]`` their probabilities."""
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 100, "save_strategy": "no"}
        schedule = {"learning_rate": _LEARNING_RATE, "lr_scheduler_type": "cosine", "adam_beta2": _ADAM_BETA2}
        schedule |= {"max_grad_norm": 0.0}
        sampled = {"num_generations": k, "generation_batch_size": answers, "max_new_tokens": self.space.mask.shape[1]}
        args = OnlineConfig(
            str(folder),
            max_length=16,
            per_device_train_batch_size=answers // k,
            max_steps=steps,
            forward_path="padded",  # for answers this short, quicker than the packed path
            **quiet | schedule | sampled | settings,
        )
        # the same prompt many times; it differs in white space, which the tokenizer leaves out
        rows = [{"prompt": "a" + " " * number} for number in range(answers // k)]
        trainer = OnlineTrainer(
            self.model, args, rows, processing_class=letter_tokenizer(self.space.shape[1]), annotator=self.score
        )
        trainer.train()
        return self.probabilities()

    def train_exactly(
        self, name: str, beta: float, advantages: Advantages, estimator: KLEstimator, steps: int
    ) -> Tensor:
        """Train the model on the expected loss of fresh answers; returns ``[A]`` their probabilities.

        Args:
            name: of a policy gradient.
            beta: the coefficient of the KL term of the loss.
            advantages: the expected advantages of all answers under a policy.
            estimator: of the KL term.
            steps: of Adam, with the schedule of :meth:`train`.
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
    """Train once; the total variation from the fixed point, before and after, and that from the optimum.

    ``exact`` is for rows with a KL term in the loss; ``answers`` do not matter then.
    """
    row = ROWS[name]
    options = row.options(beta) | settings
    k = options.pop("num_generations", _ANSWERS_TO_A_PROMPT)
    expected = row.fixed_point(task, beta, k)
    best = optimum(task.space, task.start, task.rewards, beta)
    if exact:
        found = task.train_exactly(options["objective"], beta, row.advantages(task, k), row.kl_in_loss, steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = task.train(Path(folder), answers=answers, k=k, steps=steps, **options)
    return {
        "start": distance(task.space.probabilities(task.start), expected),
        "trained": distance(found, expected),
        "from the optimum": distance(found, best),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train all rows for every beta, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--betas", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--steps", type=int, default=250, help="at beta 1; at others inversely proportional (250)")
    parser.add_argument("--answers", type=int, default=256, help="in a step (default 256)")
    parser.add_argument("--exact", action="store_true", help="train on expectations (rows with a KL term in the loss)")
    given = parser.parse_args(argv)
    rows = [name for name in given.rows if ROWS[name].kl_in_loss or not given.exact]
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    figures = Figures(given.output_dir / "figures.json")
    for name, beta in product(rows, given.betas):
        task, steps = Task(tokens=11, longest=3), round(given.steps / beta)
        train = partial(measure, name, beta, task, answers=given.answers, steps=steps, exact=given.exact)
        what = f"{name} | {beta}" + " | exact" * given.exact
        found = figures.once(what, train)
        print(f"{what}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
