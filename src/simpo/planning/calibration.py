"""The speed of this machine: small training steps are timed, and rates are fitted to their operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import LlamaConfig, LlamaForCausalLM

from simpo.errors import SimpoError
from simpo.models.devices import device
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import choose_path, policy_logprobs
from simpo.planning.cards import Rates
from simpo.planning.tracing import Cost, Tracer, attended

# Hidden size, layers, vocabulary, and pairs of a prompt with two responses of so many tokens each.
_ON_A_CPU = (
    (64, 4, 500, 8, 10),
    (128, 2, 8000, 4, 40),
    (256, 6, 2000, 4, 60),
    (256, 2, 4000, 1, 300),
    (512, 2, 500, 8, 60),
)
_ON_A_GPU = ((1024, 4, 8000, 4, 300), (2048, 2, 32000, 16, 200), (4096, 2, 32000, 16, 300), (4096, 1, 500, 2, 4000))
_REPEATS = 5


def measure_rates(report: Callable[[str], None]) -> Rates:
    """The rates of this machine, in half precision on a GPU and in fp32 on a CPU; takes about a minute."""
    cpu, samples = device().type == "cpu", []
    for hidden, layers, vocabulary, pairs, tokens in _ON_A_CPU if cpu else _ON_A_GPU:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // (32 if cpu else 128),
            num_key_value_heads=hidden // (64 if cpu else 512),
        )
        model: Any = LlamaForCausalLM(config).to(device(), torch.float32 if cpu else torch.bfloat16)
        ids = [3] * tokens
        batch = PackedBatch.build([TokenizedComparison(ids, [ids, ids])] * pairs).to(device())
        choose_path(model, batch)
        samples.append(_measure(model, batch, cpu))
        report(f"{batch.tokens} tokens, hidden size {hidden}, {layers} layers: {samples[-1][1]:.3g} s")
    return fit_rates(samples)


def _measure(model: Any, batch: PackedBatch, cpu: bool) -> tuple[Cost, float]:
    """The cost of forward and backward, and their median seconds."""

    def step() -> None:
        policy_logprobs(model, batch).sum().backward()
        if not cpu:
            torch.accelerator.synchronize()

    step()
    with Tracer(attended(batch)) as tracer:
        step()
    # of one thread, so that other processes of the machine do not count
    clock = time.process_time if cpu and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(_REPEATS):
        start = clock()
        step()
        seconds.append(clock() - start)
    return Cost(**tracer.costs), float(np.median(seconds))


def fit_rates(samples: Sequence[tuple[Cost, float]]) -> Rates:
    """The rates with the smallest relative errors for costs and their seconds, least squares without negative ones."""
    if not all(seconds > 0 for _, seconds in samples):
        raise SimpoError("--calibrate: a step took no measurable time; the clock of this machine is too coarse")
    features = np.array([np.array(astuple(cost)) / seconds for cost, seconds in samples])
    scale = features.max(axis=0)
    if missing := [one.name for one, most in zip(fields(Cost), scale, strict=True) if not most]:
        raise SimpoError(f"--calibrate: the measured steps contain no operations of the kind {', '.join(missing)}")
    solution, _ = nnls(features / scale, np.ones(len(samples)))
    product, attention, moved, overhead = np.maximum(solution / scale, 1e-30)
    return Rates(1 / product, 1 / attention, 1 / moved, overhead)
