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

    A figure that is NaN says nothing about its row, and its mean is over the other rows; the loss always counts.

    Args:
        names: of the figures, ``N``, the loss first.
        device: where the sums are kept.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        # [2, N] sums of figures and of the weights that they count with
        self._since_log = torch.zeros(2, len(names), device=device, dtype=widest_type(device))
        self._before_log = torch.zeros(2, len(names), dtype=torch.float64)  # of all ranks: what earlier logs took

    def add(self, figures: Tensor, weights: Tensor) -> None:
        """Count rows' ``figures``, ``[C, N]``, with ``weights``, ``[C]``."""
        sums = self._since_log
        figures, weights = figures.to(sums), weights.to(sums, non_blocking=True)
        says_nothing = figures.isnan()
        says_nothing[:, 0] = False
        sums += torch.stack([weights @ figures.masked_fill(says_nothing, 0), weights @ (~says_nothing).to(sums)])

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call, over all ranks, by name, of what there is. ``reduce`` sums over ranks."""
        taken = reduce(self._since_log.clone()).cpu().double()
        self._since_log.zero_()
        self._before_log += taken
        return self._means(taken)

    def overall(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the start, over all ranks and, after a resume, over the whole run."""
        return self._means(self._before_log + reduce(self._since_log.clone()).cpu().double())

    def _means(self, sums: Tensor) -> dict[str, float]:
        columns = zip(self._names, *sums.tolist(), strict=True)
        return {name: total / weight for name, total, weight in columns if weight}

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON; the same on every rank."""
        return {"since_log": reduce(self._since_log.clone()).tolist(), "before_log": self._before_log.tolist()}

    def restore(self, state: dict[str, Any], *, main: bool) -> None:
        """Continue from ``state``; the main rank takes the sums of all."""
        since_log = self._since_log.new_tensor(state["since_log"])
        self._since_log = since_log if main else torch.zeros_like(since_log)
        self._before_log = torch.tensor(state["before_log"], dtype=torch.float64)
