"""Run folders with known contents, and one browser for all pages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.browser import Browser, chromium

from simpo.runs.files import write_lines
from simpo.runs.folder import RunFolder
from simpo.runs.results import Metric, write_results


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A browser shared by all page tests, which are skipped without one."""
    chromium()
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def scores(chosen, rejected, tokens):
    """Return rows of held-out scores for pairs, for SimPO with beta 2."""
    return [
        {
            "where": f"pairs.jsonl:{row + 1}", "tokens": [int(a), int(b)], "weight": 1.0,
            "loss": 1.0, "rewards/chosen": 2 * w, "rewards/rejected": 2 * l, "rewards/accuracies": float(w > l),
            "rewards/margins": 2 * (w - l), "logps/chosen": w, "logps/rejected": l,
        }
        for row, (w, l, (a, b)) in enumerate(zip(chosen, rejected, tokens, strict=True))  # noqa: E741
    ]  # fmt: skip


@pytest.fixture(scope="session")
def make_run():
    """``make_run(path, texts=..., pairs=..., steps=..., finished=...)``: a training run folder with random numbers."""

    def make(path, *, texts=("A good answer.", "A bad one."), pairs=60, steps=20, finished=True, **settings):
        rng = np.random.default_rng(0)
        tokens = rng.integers(5, 40, (pairs, 2))
        before = rng.normal(-1.0, 0.3, (2, pairs)).tolist()
        after = [np.add(before[0], 0.4).tolist(), before[1]]
        with RunFolder(path, command="train") as run:
            run.begin(
                {"data/eval": "0" * 64, "seed": 1},
                argv=["recipe.yaml"],
                resolved={"objective": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5, "learning_rate": 1e-6} | settings,
            )
            run.metrics.append(
                {
                    "step": step,
                    "epoch": step / steps,
                    "loss": 1 / step,
                    "grad_norm": 1.0,
                    "rewards/accuracies": 0.5,
                    **({"eval_loss": 1 / step, "eval_rewards/accuracies": 0.75} if step % 5 == 0 else {}),
                }
                for step in range(1, steps + 1)
            )
            write_lines(path / "held_out_before.jsonl", scores(*before, tokens))
            examples = [
                {
                    "row": row,
                    "where": f"pairs.jsonl:{row + 1}",
                    "prompt": texts[0],
                    "responses": [{"texts": [text, "."], "logps": [-1.0, -0.5]} for text in texts],
                }
                for row in range(min(pairs, 12))
            ]
            write_lines(path / "examples_before.jsonl", examples)
            if finished:
                write_lines(path / "held_out_after.jsonl", scores(*after, tokens))
                for example in examples:
                    for response in example["responses"]:
                        response["logps"] = [-0.5, -0.7]
                write_lines(path / "examples_after.jsonl", examples)
                metrics = [
                    Metric("train/steps", steps),
                    Metric("train/tokens", 12345),
                    Metric("data/train/dropped", 3, n=70),
                ]
                write_results(path, command="train", fingerprint=run.fingerprint, metrics=metrics)
                run.finish()
        return path

    return make


@pytest.fixture
def rows_of():
    """Return a function that reads the rows of a JSON lines file."""
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]
