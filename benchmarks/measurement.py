"""What is measured of an entrant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """What a worker reports.

    Attributes:
        name: the entrant's.
        seconds: duration of all measured steps at their median pace, by the setting's clock. A step that compiles
            something takes seconds longer, but a training of hours has only few of them.
        step_seconds: durations of the measured steps, one by one.
        pairs: in them.
        tokens: in those, every prompt counted once and no padding, so that all entrants have the same number.
        losses: of every step, the warm-up's first.
        forwards: how many micro-batches they made.
        flops: counted arithmetic of the measured steps, only what causal masks leave, logits made once.
        flops_recomputed: the same with the logits made again in backward.
        necessary_flops: see :func:`benchmarks.arithmetic.necessary_flops`; the same for all entrants.
        peak_flops: per second, of large square products, on the same threads right after.
        peak_mib: most memory of the process (of PyTorch on the GPU, with CUDA).
        grown_mib: the same less what was in use when the model had been made.
        products_seconds: time of the same matrix products alone, if asked for.
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
