"""Time the matrix products of a step on their own: how long a step would take if nothing else took time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from benchmarks.arithmetic import Product

_REPEATS = 3


Clock = Callable[[], float]


def seconds_of(products: Iterable[Product], dtype: torch.dtype, device: str, clock: Clock = time.perf_counter) -> float:
    """Return the total time of ``products`` in sequence: each distinct shape is timed and multiplied by its count."""
    counts: Counter[Product] = Counter()
    for product in products:
        counts[product._replace(count=1)] += product.count
    return sum(count * _seconds(product, dtype, device, clock) for product, count in counts.items())


def _seconds(product: Product, dtype: torch.dtype, device: str, clock: Clock) -> float:
    """Return the fastest of several runs after a warm-up."""
    m, k, n, batch, _ = product
    left = torch.randn(batch, m, k, device=device, dtype=dtype).squeeze(0)
    right = torch.randn(batch, k, n, device=device, dtype=dtype).squeeze(0)
    times = []
    for _ in range(1 + _REPEATS):
        _wait(device)
        start = clock()
        left @ right
        _wait(device)
        times.append(clock() - start)
    return min(times[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
