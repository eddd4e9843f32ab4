"""Learn shortest paths on random graphs from random walks with PPO and RLOO.

    python -m benchmarks.random_walks --output_dir runs/random-walks

The task comes from trlX's example of the same name: random edges between 21 nodes, the first of which is the goal. A
small Llama is first trained on random walks, most of which take detours or never arrive. It is then trained on its own
walks. A walk's score is its optimality: the length of the shortest path divided by the length of the walk, or 0 if it
uses a missing edge or does not arrive. The optimality of walks sampled from every node is measured before and after
online training. Runs already in ``figures.json`` are not repeated.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import shortest_path
from transformers.utils import logging as hf_logging

from benchmarks.letters import letter, letter_model, letter_tokenizer
from benchmarks.measurement_cache import MeasurementCache, format_interval
from simpo.generation.chunks import gather, missing_chunks, sample_chunks
from simpo.generation.engine import TransformersEngine
from simpo.generation.settings import SamplingSettings
from simpo.statistics import mean_interval
from simpo.training.configs import OnlineConfig, SFTConfig
from simpo.training.online import OnlineTrainer
from simpo.training.rollouts import AnsweredPrompt
from simpo.training.sft import SFTTrainer

NODES, LONGEST, WALKS, EDGE = 21, 10, 1000, 0.1
ANSWER = LONGEST + 1  # tokens, including the one that ends a walk
MEASURED = 50  # walks per start node
_QUIET: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
_SFT: dict[str, Any] = {"learning_rate": 3e-3, "num_train_epochs": 5, "per_device_train_batch_size": 50}
ONLINE: dict[str, dict[str, Any]] = {
    "rloo": {"learning_rate": 1e-3, "kl_coef": 0.01},
    "ppo": {"learning_rate": 1e-3, "kl_coef": 0.01, "sync_every": 2, "rollout_epochs": 2},
}


class Graph:
    """A random directed graph with a path from every node to node 0.

    Attributes:
        edges: ``[N, N]`` bool adjacency matrix.
        steps: ``[N]`` length of the shortest path from each node to node 0.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while True:
            self.edges = (rng.random((NODES, NODES)) < EDGE) & ~np.eye(NODES, dtype=bool)
            self.steps = shortest_path(self.edges, unweighted=True)[:, 0]
            if np.isfinite(self.steps).all() and self.steps.max() <= LONGEST:
                break

    def walk(self, rng: random.Random) -> list[int]:
        """Take a random walk from a random node until it reaches node 0 or has taken ``LONGEST`` steps."""
        nodes = [rng.randrange(1, NODES)]
        while nodes[-1] != 0 and len(nodes) <= LONGEST:
            nodes.append(rng.choice(np.flatnonzero(self.edges[nodes[-1]]).tolist()))
        return nodes

    def optimality(self, nodes: Sequence[int]) -> float:
        """Return the optimality of a walk, between 0 and 1."""
        arrives = nodes[-1] == 0 and all(self.edges[a, b] for a, b in pairwise(nodes))
        return float(self.steps[nodes[0]]) / (len(nodes) - 1) if arrives and len(nodes) > 1 else 0.0


def _text(nodes: Sequence[int]) -> str:
    return " ".join(letter(1 + node) for node in nodes)


def _optimality(graph: Graph, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the optimality of a walk in token ids. It must end with the end token; steps past the goal count."""
    if not answer or answer[-1] != 0:
        return 0.0
    return graph.optimality([token - 1 for token in (*prompt, *answer[:-1])])


def measure(model: Any, graph: Graph, seed: int) -> float:
    """Return the mean optimality of walks sampled from every node but the goal."""
    prompts = [[1 + node] for node in range(1, NODES)]
    settings = SamplingSettings(
        n=MEASURED, temperature=1, top_p=1, max_new_tokens=ANSWER, seed=seed, chunk_size=len(prompts) * MEASURED
    )
    engine = TransformersEngine(model, letter_tokenizer(1 + NODES))
    records = sample_chunks(engine, prompts, settings, missing_chunks(prompts, settings))
    by_prompt = zip(prompts, gather(records, len(prompts)), strict=True)
    return float(np.mean([_optimality(graph, prompt, list(one.ids)) for prompt, walks in by_prompt for one in walks]))


def run(seed: int, objective: str, rollouts: int, folder: Path) -> dict[str, float]:
    """Train on the graph of a seed; return the mean optimality after fine-tuning and after online training."""
    graph, rng = Graph(seed), random.Random(seed)  # noqa: S311 - sampling, not secrets
    tokenizer = letter_tokenizer(1 + NODES)
    walks = [graph.walk(rng) for _ in range(WALKS)]
    rows = [{"prompt": _text(walk[:1]), "completion": " " + _text(walk[1:])} for walk in walks]
    model = letter_model(1 + NODES, layers=2, spread=0.06, seed=seed)
    settings = SFTConfig(
        str(folder / f"sft-{seed}"), seed=seed, max_length=1 + ANSWER, logging_steps=50, **_SFT, **_QUIET
    )
    SFTTrainer(model, settings, rows, processing_class=tokenizer).train()
    before = measure(model, graph, seed)

    def score(answered: Sequence[AnsweredPrompt]) -> list[list[float]]:
        return [[_optimality(graph, each.prompt.ids, one.ids) for one in each.samples] for each in answered]

    prompts = [{"prompt": _text([node])} for node in range(1, NODES)]
    args = OnlineConfig(
        str(folder / f"{objective}-{seed}"),
        objective=objective,
        seed=seed,
        max_steps=rollouts * ONLINE[objective].get("sync_every", 1),
        num_generations=8,
        generation_batch_size=8 * len(prompts),
        per_device_train_batch_size=len(prompts),
        max_length=32,
        max_new_tokens=ANSWER,
        logging_steps=10,
        **ONLINE[objective] | _QUIET,
    )
    OnlineTrainer(model, args, prompts, processing_class=tokenizer, annotator=score).train()
    return {"before": before, "after": measure(model, graph, seed)}


def main(argv: Sequence[str] | None = None) -> None:
    """Train on every graph and print the means with intervals over graphs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--objectives", nargs="+", default=list(ONLINE), choices=list(ONLINE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rollouts", type=int, default=60, help="rollouts of 8 walks per node (default 60)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    cache, found = MeasurementCache(given.output_dir / "figures.json"), {}
    for seed, objective in product(given.seeds, given.objectives):
        train = partial(run, seed, objective, given.rollouts, given.output_dir)
        found[seed, objective] = cache.get_or_measure(f"{objective} | seed {seed}", train)
        print(f"{objective} | seed {seed}: {found[seed, objective]}", flush=True)
    for objective, when in product(given.objectives, ("before", "after")):
        mean = mean_interval([found[seed, objective][when] for seed in given.seeds])
        print(f"{objective}, {when}: mean {format_interval(mean)} over {mean.n} graphs")


if __name__ == "__main__":
    main()
