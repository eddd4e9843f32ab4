"""The measurement of one entrant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """The results a worker reports.

    Attributes:
        name: the entrant's name.
        seconds: duration of all measured steps at their median pace, by the setting's clock. The median leaves out
            steps that compile something: they take seconds longer, but are rare in a training run of hours.
        step_seconds: duration of each measured step.
        pairs: pairs in the measured steps.
        tokens: tokens in those pairs, without padding and with each prompt counted once; the same for all entrants.
        losses: loss of every step, starting with the warm-up step.
        forwards: number of micro-batches in the measured steps.
        flops: FLOPs of the measured steps, visible query-key pairs only, each logit computed once.
        flops_recomputed: the same with the logits recomputed in backward.
        necessary_flops: see :func:`benchmarks.arithmetic.necessary_flops`; the same for all entrants.
        peak_flops: FLOP/s of large square products on the same threads, measured right afterwards.
        peak_mib: peak memory of the process (of PyTorch's allocator with CUDA).
        grown_mib: peak memory minus the memory in use once the model was built.
        products_seconds: time for the same matrix products on their own, if requested.
    """

    name: str
    seconds: float
    step_seconds: list[float]
    pairs: int
    tokens: int
    losses: list[float]
    forwards: int
    flops: int
    flops_recomputed: int
    necessary_flops: int
    peak_flops: float
    peak_mib: float
    grown_mib: float
    products_seconds: float | None = None
