"""Which rows a loss or gradient that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn

_NAMED = 5


def rows_not_finite(rows: Sequence[int], losses: Tensor) -> list[int]:
    """Those of ``rows``, ``[C]``, whose loss, ``[C]``, is NaN or infinite."""
    return [row for row, finite in zip(rows, losses.isfinite().tolist(), strict=True) if not finite]


def rows_without_gradient(model: nn.Module, rows: Iterable[int], loss_of: Callable[[int], Tensor]) -> list[int]:
    """Those of ``rows`` whose own loss, ``loss_of(row)``, has a gradient that is NaN or infinite somewhere."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for row in rows:
        gradients = torch.autograd.grad(loss_of(row), parameters, allow_unused=True)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None):
            found.append(row)
    return found


def describe_rows(dataset: Dataset, rows: Sequence[int]) -> str:
    """Where ``rows`` come from, as text: the first few by file and line."""
    known = "where" in dataset.column_names
    named = [dataset[row]["where"] if known else f"row {row}" for row in rows[:_NAMED]]
    return ", ".join(named) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
