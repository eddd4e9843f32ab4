"""The matrix products of a step, timed alone: what a step would take if nothing else took time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from benchmarks.arithmetic import Product

_REPEATS = 3


Clock = Callable[[], float]


def seconds_of(products: Iterable[Product], dtype: torch.dtype, device: str, clock: Clock = time.perf_counter) -> float:
    """Time of all ``products`` one after the other; every distinct shape is timed and multiplied by its number."""
    counts: Counter[Product] = Counter()
    for product in products:
        counts[product._replace(count=1)] += product.count
    return sum(count * _seconds(product, dtype, device, clock) for product, count in counts.items())


def _seconds(product: Product, dtype: torch.dtype, device: str, clock: Clock) -> float:
    """The quickest of a few runs, after one that is not timed."""
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
