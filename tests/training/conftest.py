"""Fixtures for training tests: tokenized pairs, configurations, and losses computed by their definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from simpo import PreferenceConfig, PreferenceTrainer, Responses
from simpo.packing.layout import TokenizedComparison


@pytest.fixture(scope="session")
def pairs(random_comparisons):
    """``pairs(n)``: a tokenized dataset of ``n`` random pairs of 20 packed tokens each, with varied shapes."""

    def make(rows: int, *, seed: int = 0, responses: int = 2) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        shapes = []
        for _ in range(rows):
            cuts = 1 + torch.randperm(19, generator=generator)[:responses].sort().values
            edges = [0, *cuts.tolist(), 20]
            prompt, *lengths = (b - a for a, b in itertools.pairwise(edges))
            shapes.append((prompt, tuple(lengths)))
        return _dataset(random_comparisons(*shapes, seed=seed))

    return make


def _dataset(comparisons: list[TokenizedComparison]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [comparison.prompt_ids for comparison in comparisons],
            "response_ids": [comparison.response_ids for comparison in comparisons],
            "where": [f"made up:{row}" for row in range(len(comparisons))],
            "extra": ["{}"] * len(comparisons),
        }
    )


@pytest.fixture(scope="session")
def as_dataset():
    """``as_dataset(comparisons)``: a tokenized dataset as :func:`simpo.data.tokenizing.prepare` returns it."""
    return _dataset


@pytest.fixture
def config(tmp_path):
    """``config(**settings)``: a quiet CPU configuration without gradient clipping or weight decay."""

    def make(**settings) -> PreferenceConfig:
        quiet = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True}
        plain = {"save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
        plain |= {"reference_cache": str(tmp_path / "reference")}
        return PreferenceConfig(**quiet | plain | settings)

    return make


@pytest.fixture
def make_trainer(config, make_model):
    """``make_trainer(rows, **settings)``: a trainer for a tiny GPT-2 that is float64 throughout."""

    def make(rows, *, model=None, eval_dataset=None, callbacks=None, optimizers=(None, None), **settings):
        model = make_model("gpt2") if model is None else model
        args = config(**settings)
        return PreferenceTrainer(
            model, args, rows, eval_dataset=eval_dataset, callbacks=callbacks, optimizers=optimizers
        )

    return make


@pytest.fixture(scope="session")
def naive_pairs(naive_logprobs):
    """``naive_pairs(model, rows)``: average log-probabilities of chosen and rejected, ``[rows]`` each."""

    def naive(model, rows):
        means = []
        for row in rows:
            comparison = TokenizedComparison(row["prompt_ids"], row["response_ids"])
            chosen, rejected = row["response_ids"]
            logps = naive_logprobs(model, [comparison])
            means.append(torch.stack([logps[: len(chosen)].mean(), logps[len(chosen) :][: len(rejected)].mean()]))
        return torch.stack(means).unbind(dim=1)

    return naive


@pytest.fixture(scope="session")
def naive_responses(naive_logprobs):
    """``naive_responses(model, prompts, responses)``: all responses, ``[R]``, by the model's own forward."""

    def naive(model, prompts, responses) -> Responses:
        comparisons = [TokenizedComparison(p, r) for p, r in zip(prompts, responses, strict=True)]
        lengths = [len(ids) for several in responses for ids in several]
        logps = naive_logprobs(model, comparisons).split(lengths)
        sums = torch.stack([part.sum() for part in logps])
        return Responses(sums, torch.tensor(lengths, dtype=sums.dtype))

    return naive


@pytest.fixture(scope="session")
def naive_losses(naive_pairs):
    """``naive_losses(model, rows)``: SimPO losses by the formula, ``[rows]``, with beta 2 and gamma 1 by default."""

    def naive(model, rows, beta: float = 2.0, gamma: float = 1.0):
        chosen, rejected = naive_pairs(model, rows)
        return -F.logsigmoid(beta * chosen - beta * rejected - gamma)

    return naive
