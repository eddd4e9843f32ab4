"""Weighted means of the figures of training: since the last log, and since the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def widest_type(device: torch.device) -> torch.dtype:
    """In which figures are kept, so that what ranks and micro-batches they came by cannot be seen in them."""
    return torch.float32 if device.type == "mps" else torch.float64


class RunningMeans:
    """Sums over rows on one rank; nothing waits for the device until a mean is asked for.

    Args:
        names: of the figures, ``N``.
        device: where the sums are kept.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        # [N + 1], the last is the weights' sum
        self._since_log = torch.zeros(len(names) + 1, device=device, dtype=widest_type(device))
        self._before_log = [0.0] * (len(names) + 1)  # of all ranks: what earlier logs took

    def add(self, figures: Tensor, weights: Tensor) -> None:
        """Count rows' ``figures``, ``[C, N]``, with ``weights``, ``[C]``."""
        sums = self._since_log
        weights = weights.to(sums, non_blocking=True)
        ones = figures.new_ones(len(figures), 1)
        sums += weights @ torch.cat([figures, ones], dim=1).to(sums)

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call, over all ranks, by name; none if nothing was. ``reduce`` sums over ranks."""
        taken = reduce(self._since_log.clone()).tolist()
        self._since_log.zero_()
        self._before_log = [a + b for a, b in zip(self._before_log, taken, strict=True)]
        return self._means(taken)

    def overall(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the start, over all ranks and, after a resume, over the whole run."""
        recent = reduce(self._since_log.clone()).tolist()
        return self._means([a + b for a, b in zip(self._before_log, recent, strict=True)])

    def _means(self, sums: Sequence[float]) -> dict[str, float]:
        *totals, weight = sums
        return {name: total / weight for name, total in zip(self._names, totals, strict=True)} if weight else {}

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON; the same on every rank."""
        return {"since_log": reduce(self._since_log.clone()).tolist(), "before_log": list(self._before_log)}

    def restore(self, state: dict[str, Any], *, main: bool) -> None:
        """Continue from ``state``; the main rank takes the sums of all."""
        since_log = self._since_log.new_tensor(state["since_log"])
        self._since_log = since_log if main else torch.zeros_like(since_log)
        self._before_log = list(state["before_log"])
