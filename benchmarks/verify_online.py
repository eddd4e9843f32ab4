"""Compare vLLM's greedy answers with those of each step's weights: python -m benchmarks.verify_online MODEL FOLDER

FOLDER is a ``simpo online`` run from MODEL with ``engine: vllm``, ``temperature: 0``, ``sync_every: 1`` and
``save_steps: 1``, of a model or an adapter, in float32. The answers in rollout k must match those of checkpoint k token
by token, and not all may match those of the previous checkpoint, which an engine with stale weights would give.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from simpo.models.loading import load_model
from simpo.models.settings import ModelArguments
from simpo.runs.files import read_lines
from simpo.training.checkpoints import step_of

TOLERANCE = 3e-5  # nats per token


@torch.no_grad()
def greedy(model: Any, prompt: list[int], length: int) -> tuple[list[int], float]:
    """Decode ``length`` tokens greedily without a cache, and return them with their log-probability."""
    ids, logp = list(prompt), 0.0
    for _ in range(length):
        logps = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(logps.argmax()))
        logp += logps.max().item()
    return ids[len(prompt) :], logp


def main(name: str, folder: str) -> int:
    """Print how many answers match the current and the previous weights; return 1 unless the current ones match."""
    steps = [name, *map(str, sorted(Path(folder).glob("checkpoint-*"), key=step_of))]
    models = [load_model(ModelArguments(step, dtype="float32")).eval() for step in steps]
    wrong, old, worst, total = 0, 0, 0.0, 0
    for path, (before, now) in zip(
        sorted(Path(folder, "rollouts").glob("0*.jsonl")), pairwise([None, *models]), strict=False
    ):
        for row in read_lines(path):
            (ids,), (logp,) = row["response_ids"], row["engine_logps"]
            expected, naive = greedy(now, row["prompt_ids"], len(ids))
            wrong, total = wrong + (ids != expected), total + 1
            worst = max(worst, abs(naive - logp) / len(ids)) if ids == expected else worst
            old += before is not None and greedy(before, row["prompt_ids"], len(ids))[0] == ids
    print(f"{total - wrong} of {total} greedy answers in {len(steps) - 1} rollouts match the current weights;")
    print(f"{old} match the previous weights; log-probabilities differ by at most {worst:.1e} nats per token")
    return int(not total or wrong > 0 or old == total or worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
