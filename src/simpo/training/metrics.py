"""What is logged of a batch of pairs, under the names that people's dashboards have."""

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


def pair_metrics(
    objective: Objective,
    hyperparameters: Mapping[str, Any],
    losses: Tensor,
    w: Responses,
    l: Responses,  # noqa: E741
) -> Tensor:
    """``[B, len(NAMES)]`` figures of ``B`` pairs, detached.

    ``logps/*`` are averages over a response's tokens for length-normalised objectives and sums for the others, as in
    the curves of the paper.
    """
    chosen = objective.reward(w, **hyperparameters)
    rejected = objective.reward(l, **hyperparameters)
    w_logp, l_logp = (w.avg, l.avg) if objective.length_normalized else (w.logp, l.logp)
    columns = (losses, chosen, rejected, (chosen > rejected).to(losses.dtype), chosen - rejected, w_logp, l_logp)
    return torch.stack(columns, dim=-1).detach()
