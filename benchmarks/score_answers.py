"""K answers to one prompt, scored or trained on: a shared prompt versus the prompt repeated for every answer.

Measures CPU time on one thread, alternating between the two, and takes the fastest of several rounds of each. The last
columns compare the ratio with the bound from FLOP counts. Run from the repository root::

    python -m benchmarks.score_answers
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from benchmarks.arithmetic import Forward, Shape, packed_forward
from benchmarks.setting import Setting, build_model, model_config
from simpo import score_responses
from simpo.objectives.policy_gradient import POLICY_GRADIENTS, Rollout
from simpo.objectives.ppo import value_loss
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import responses_of
from simpo.packing.scoring import score_answers, token_outputs

KINDS = ("log-probabilities", "rewards", "ppo update")  # the update includes backward
Score = Callable[[Sequence[TokenizedComparison]], Tensor]


class Outcome(NamedTuple):
    """Seconds with a shared prompt and one by one, and the speedup that FLOP counts allow."""

    shared: float
    one_by_one: float
    allowed: float

    @property
    def measured(self) -> float:
        """The measured speedup."""
        return self.one_by_one / self.shared


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="score_answers", description="Score K answers to one prompt.")
    parser.add_argument("--answers", type=int, default=8, help="number of answers")
    parser.add_argument("--prompt", type=int, default=512, help="prompt length in tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128], help="answer lengths in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="small", help="a key of benchmarks.setting.MODELS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting("", threads=1, model=options.model)
    table = Table(title=f"{options.answers} answers to a prompt of {options.prompt} tokens, model '{options.model}'")
    for column in ("scores", "tokens", "shared s", "one by one s", "ratio", "allowed", "share"):
        table.add_column(column, justify="left" if column == "scores" else "right")
    for kind in KINDS:
        score = make_scorer(kind, setting)
        for length in options.lengths:
            comparison = make_comparison(options.prompt, [length] * options.answers, setting.vocabulary)
            found = measure(kind, score, comparison, setting, options.rounds)
            figures = (
                f"{found.shared:.2f}",
                f"{found.one_by_one:.2f}",
                f"{found.measured:.2f}",
                f"{found.allowed:.2f}",
            )
            table.add_row(kind, str(length), *figures, f"{found.measured / found.allowed:.0%}")
    Console(width=110).print(table)
    return 0


def make_scorer(kind: str, setting: Setting) -> Score:
    """Return a function that scores comparisons with a randomly initialized model."""
    if kind == "log-probabilities":
        model = build_model(setting)
        return lambda comparisons: score_responses(model, comparisons).logp
    if kind == "ppo update":
        return _ppo_update(setting)
    torch.manual_seed(0)
    config: Any = model_config(setting)
    config.num_labels = 1
    reward_model = AutoModelForSequenceClassification.from_config(config)
    return lambda comparisons: score_answers(reward_model, comparisons)


def _ppo_update(setting: Setting) -> Score:
    """Return a function that computes PPO's gradients, with a value head on the policy, and the log-probabilities."""
    model, row = build_model(setting), POLICY_GRADIENTS["ppo"]
    head = nn.Linear(model.config.hidden_size, 1)

    def update(comparisons: Sequence[TokenizedComparison]) -> Tensor:
        batch = PackedBatch.build(comparisons)
        model.zero_grad()
        with torch.enable_grad():
            found = token_outputs(model, batch, value_head=head)
            targets = torch.ones_like(found.logps)
            rollout = Rollout(found.logps, found.logps.detach(), targets, batch.response_of, len(batch.lengths))
            values = value_loss(found.values, found.values.detach(), targets, clip=0.2)
            (row.loss(rollout).sum() + values.sum()).backward()
        return responses_of(batch, found.logps.detach()).logp

    return update


def make_comparison(prompt: int, answers: Sequence[int], vocabulary: int) -> TokenizedComparison:
    """Return a comparison of random tokens with these lengths."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(1, vocabulary, (count,), generator=generator).tolist()

    return TokenizedComparison(ids(prompt), [ids(count) for count in answers])


def split_by_answer(comparison: TokenizedComparison) -> list[TokenizedComparison]:
    """Split a comparison into one per answer, each with its own copy of the prompt."""
    return [TokenizedComparison(comparison.prompt_ids, [ids]) for ids in comparison.response_ids]


@torch.no_grad()
def measure(kind: str, score: Score, comparison: TokenizedComparison, setting: Setting, rounds: int) -> Outcome:
    """Time both ways in turns, after a warm-up that checks that they agree."""
    singles = split_by_answer(comparison)
    torch.testing.assert_close(score([comparison]), torch.cat([score([one]) for one in singles]), rtol=1e-4, atol=1e-3)
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        start = time.process_time()
        score([comparison])
        between = time.process_time()
        for one in singles:
            score([one])
        times.append((between - start, time.process_time() - between))
    shared, one_by_one = map(min, zip(*times, strict=True))
    return Outcome(shared, one_by_one, allowed_ratio(kind, comparison, Shape.of(model_config(setting))))


def allowed_ratio(kind: str, comparison: TokenizedComparison, shape: Shape) -> float:
    """Return the ratio of FLOPs one by one to FLOPs with a shared prompt (including backward for the update)."""

    def flops(forward: Forward) -> int:
        if kind == "ppo update":
            return forward.flops(shape)
        products = [*forward.layer_products(shape), *forward.attention_products(shape)]
        head = forward.head_product(shape).flops if kind == "log-probabilities" else 0  # a reward head has a single row
        return sum(product.flops for product in products) + head

    one_by_one = sum(flops(packed_forward([one])) for one in split_by_answer(comparison))
    return one_by_one / flops(packed_forward([comparison]))


if __name__ == "__main__":
    sys.exit(main())
