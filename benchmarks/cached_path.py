"""Sharing prompts through the cache versus padded rows: ``python -m benchmarks.cached_path [--type TYPE] [...]``

Times a training step (forward and backward over all micro-batches) of a hybrid model, wide enough that matrix products
dominate, on pairs as long as those in HH-RLHF. The two paths alternate within one process, so that other load on the
machine affects both. The ratio of their median times is shown next to the ratio of their FLOPs as counted by PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.architectures import toy_config
from simpo.packing.batching import RowSizes, StepPlan
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import choose_path, policy_logprobs

VOCABULARY = 8192
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
}
# Additional keys for the recurrent layers, by architecture.
STATES = {
    "qwen3_5_text": {
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "lfm2": {"block_ff_dim": 1536},
    "falcon_h1": {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64},
}


_WIDTH_SUFFIXES = ("size", "heads", "ff_dim", "d_ssm")  # the width of a single head is not scaled


def scaled(values: dict[str, Any], factor: int) -> dict[str, Any]:
    """Return configuration ``values`` with all widths multiplied by ``factor``."""
    widths = {key for key in values if key.endswith(_WIDTH_SUFFIXES) and key != "vocab_size"}
    return {key: value * factor if key in widths else value for key, value in values.items()}


def pairs(count: int, seed: int = 0) -> list[TokenizedComparison]:
    """Return pairs with about 155 prompt and 40 response tokens, distributed like those in HH-RLHF."""
    random = np.random.default_rng(seed)

    def ids(mean: float, spread: float, longest: int) -> list[int]:
        size = int(np.clip(random.lognormal(np.log(mean) - spread**2 / 2, spread), 2, longest))
        return random.integers(3, VOCABULARY, size).tolist()

    return [TokenizedComparison(ids(155, 0.6, 512), [ids(40, 0.7, 160) for _ in range(2)]) for _ in range(count)]


def micro_batches(rows: list[TokenizedComparison], path: str, max_batch_tokens: int) -> list[PackedBatch]:
    """Split ``rows`` into micro-batches as training on this path does."""
    sizes = RowSizes.of(
        path,
        prompts=np.array([len(row.prompt_ids) for row in rows]),
        counts=np.array([len(row.response_ids) for row in rows]),
        longest=np.array([max(map(len, row.response_ids)) for row in rows]),
        packed=np.array([row.packed_length for row in rows]),
    )
    plan = StepPlan(sizes, rows_per_step=len(rows), max_batch_tokens=max_batch_tokens)
    step = plan.step(plan.order(epoch=0), number=0)
    return [PackedBatch.build([rows[row] for row in batch.rows]) for batch in step.micro_batches]


def steps(
    model: PreTrainedModel, rows: list[TokenizedComparison], max_batch_tokens: int
) -> dict[str, Callable[[], None]]:
    """Return one training step per path, without the optimizer."""

    def step_of(path: str) -> Callable[[], None]:
        batches = micro_batches(rows, path, max_batch_tokens)

        def step() -> None:
            model.zero_grad()
            for batch in batches:
                policy_logprobs(model, batch.to(model.device), path=path).mean().backward()

        return step

    return {path: step_of(path) for path in ("cached", "padded")}


def main(arguments: list[str] | None = None) -> None:
    """Measure both paths and print a line of the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cached_path", description=__doc__.splitlines()[0])
    parser.add_argument("--type", default="qwen3_5_text", choices=sorted(STATES))
    parser.add_argument("--pairs", type=int, default=16, help="pairs per step")
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7, help="measured steps per path")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--width", type=int, default=1, help="multiplies the model's width")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with torch.device(options.device):
        config = toy_config(options.type, **scaled(WIDE | STATES[options.type], options.width))
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    rows = pairs(options.pairs)
    assert choose_path(model, PackedBatch.build(rows[:4]).to(options.device)) == "cached"
    step = steps(model, rows, options.max_batch_tokens)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    operations, times = {}, {path: [] for path in step}
    for path, run in step.items():  # also the warm-up
        with FlopCounterMode(display=False) as counter:
            run()
        operations[path] = counter.get_total_flops()
    for _ in range(options.repeats):
        for path, run in step.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times[path].append(time.perf_counter() - start)
    medians = {path: statistics.median(values) for path, values in times.items()}
    measured, counted = (values["padded"] / values["cached"] for values in (medians, operations))
    print("| architecture | cached, s | padded, s | padded / cached | counted | share |")
    print("|---|---:|---:|---:|---:|---:|")
    print(
        f"| `{options.type}` | {medians['cached']:.2f} | {medians['padded']:.2f} | {measured:.2f} | {counted:.2f} | "
        f"{measured / counted:.0%} |"
    )


if __name__ == "__main__":
    main()
