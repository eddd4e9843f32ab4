"""Measure one entrant in a comparison; runs in its own process."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.arithmetic import Forward, Product, Shape, necessary_flops, packed_forward, padded_forward
from benchmarks.entrants import Entrant
from benchmarks.measurement import Measurement
from benchmarks.memory import in_use_mib, peak_mib
from benchmarks.peers import import_peer, liger_trainer, trl_cpo_trainer, trl_dpo_trainer
from benchmarks.products import seconds_of
from benchmarks.setting import Setting, build_model, load_comparisons
from benchmarks.simpo_entrants import Loop, planned_batches, simpo_trainer
from simpo.packing.layout import TokenizedComparison

TRAINERS = {"simpo": simpo_trainer, "trl cpo": trl_cpo_trainer, "trl dpo": trl_dpo_trainer, "liger": liger_trainer}


def work(entrant: Entrant, setting: Setting, output: Path, *, products: bool = False) -> None:
    """Train, measure, and write the :class:`Measurement` to ``output`` as JSON.

    Args:
        entrant: the trainer to measure.
        setting: the setting; :func:`benchmarks.setting.prepare` must have filled its folder.
        output: the file to write.
        products: whether to also time the matrix products on their own.
    """
    torch.set_num_threads(setting.threads)
    measured = load_comparisons(setting)[setting.pairs_per_step :]
    model = build_model(setting)
    shape = Shape.of(model.config)
    before = in_use_mib(setting.device)
    clock = Clock(setting)
    losses, batches = _train(model, entrant, setting, clock)
    peak = peak_mib(setting.device)
    del model
    forwards = _forwards(batches, entrant)
    dtype = torch.bfloat16 if "bf16" in (setting.dtype, setting.weights) else torch.float32
    alone = [product for forward in forwards for product in forward.products(shape)] if products else []
    square = Product(8192, 8192, 8192) if setting.device == "cuda" else Product(1024, 1024, 1024)
    durations = [end - start for start, end in pairwise(clock.ends)]
    steps = [measured[at : at + setting.pairs_per_step] for at in range(0, len(measured), setting.pairs_per_step)]
    found = Measurement(
        name=entrant.name,
        seconds=seconds_at_median_pace(durations, [sum(c.packed_length for c in step) for step in steps]),
        step_seconds=durations,
        pairs=len(measured),
        tokens=sum(c.packed_length for c in measured),
        losses=losses,
        forwards=len(forwards),
        flops=_with_reference(forwards, entrant, shape),
        flops_recomputed=_with_reference([replace(f, recomputed=f.scored) for f in forwards], entrant, shape),
        necessary_flops=necessary_flops(measured, shape),
        peak_flops=square.flops / seconds_of([square], dtype, setting.device, clock.now),
        peak_mib=peak,
        grown_mib=peak - before,
        products_seconds=seconds_of(alone, dtype, setting.device, clock.now) if products else None,
    )
    output.write_text(json.dumps(asdict(found)))


def seconds_at_median_pace(seconds: list[float], tokens: list[int]) -> float:
    """Return the total seconds at the median time per token, given the ``seconds`` and ``tokens`` of each step."""
    return median(time / count for time, count in zip(seconds, tokens, strict=True)) * sum(tokens)


class Clock(TrainerCallback):
    """Records when each optimizer step ended, including the warm-up step."""

    def __init__(self, setting: Setting) -> None:
        self.device = setting.device
        self.now = time.process_time if setting.clock == "cpu" else time.perf_counter
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the end of a step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(self.now())


def _train(
    model: Any, entrant: Entrant, setting: Setting, clock: Clock
) -> tuple[list[float], list[list[TokenizedComparison]]]:
    """Train; return the losses of all steps and the comparisons in each micro-batch of the measured steps."""
    if entrant.kind == "loop":
        loop = Loop(model, entrant, setting)
        loop.run(clock.on_step_end)
        return loop.losses, loop.batches()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[entrant.kind](model, entrant, setting, folder)
        trainer.add_callback(clock)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if entrant.kind == "simpo":
            return losses, planned_batches(trainer)
    size, measured = entrant.per_device, load_comparisons(setting)[setting.pairs_per_step :]
    assert size is not None
    return losses, [measured[start : start + size] for start in range(0, len(measured), size)]


def _forwards(batches: list[list[TokenizedComparison]], entrant: Entrant) -> list[Forward]:
    """Describe the work of each micro-batch; TRL's DPO computes the logits in chunks, twice."""
    if entrant.kind == "loop" or entrant.path == "auto":
        return [packed_forward(batch) for batch in batches]
    everywhere = entrant.kind in ("trl cpo", "liger") or (entrant.kind == "trl dpo" and not _scores_only_responses())
    found = [padded_forward(batch, all_logits=everywhere) for batch in batches]
    return [replace(forward, recomputed=forward.scored) for forward in found] if entrant.kind == "trl dpo" else found


def _scores_only_responses() -> bool:
    """Whether TRL's chunked output layer skips prompt tokens, which it does wherever Triton runs."""
    return torch.cuda.is_available()


def _with_reference(forwards: list[Forward], entrant: Entrant, shape: Shape) -> int:
    """Return the FLOPs of all ``forwards``, plus one extra forward pass each for a live reference."""
    total = sum(forward.visible_flops(shape) for forward in forwards)
    if entrant.objective == "dpo" and not entrant.precomputed:
        total += sum(replace(forward, recomputed=0).visible_flops(shape) for forward in forwards) // 3
    return total


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    import_peer(order["entrant"]["kind"])
    sys.stdin.readline()  # wait for its turn
    work(Entrant(**order["entrant"]), Setting(**order["setting"]), Path(order["output"]), products=order["products"])
