"""What is logged of a batch of comparisons, under the names that people's dashboards have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from simpo.objectives import Objective, Responses

NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
UNPAIRED_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
KL = "kl"


def pair_metrics(objective: Objective, hyperparameters: Mapping[str, Any], w: Responses, l: Responses) -> Tensor:  # noqa: E741
    """``[B, 6]`` figures of ``B`` pairs, detached: those of :data:`NAMES` but the loss.

    ``logps/*`` are averages over a response's tokens for length-normalised objectives and sums for the others, as in
    the curves of the paper.
    """
    chosen = objective.reward(w, **hyperparameters)
    rejected = objective.reward(l, **hyperparameters)
    right = (chosen > rejected).to(chosen.dtype)
    columns = (chosen, rejected, right, chosen - rejected, _logged(objective, w), _logged(objective, l))
    return torch.stack(columns, dim=-1).detach()


def unpaired_metrics(objective: Objective, hyperparameters: Mapping[str, Any], y: Responses, label: Tensor) -> Tensor:
    """``[B, 4]`` figures of ``B`` responses that are judged alone, detached: :data:`UNPAIRED_NAMES` but the loss.

    A desirable response (``label`` ``[B]``) has those of chosen ones, an undesirable one those of rejected ones; the
    others are NaN.
    """
    figures = (objective.reward(y, **hyperparameters), _logged(objective, y))
    columns = [values.masked_fill(hidden, torch.nan) for values in figures for hidden in (~label, label)]
    return torch.stack(columns, dim=-1).detach()


def _logged(objective: Objective, y: Responses) -> Tensor:
    return y.avg if objective.length_normalized else y.logp
