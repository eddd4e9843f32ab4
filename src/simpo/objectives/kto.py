"""KTO: desirable and undesirable responses against a reference point, paired or one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from simpo.objectives.hyperparameters import Context, NonNegative, Positive
from simpo.objectives.responses import Responses


def kto(
    w: Responses,
    l: Responses,  # noqa: E741 - the papers' w and l
    *,
    beta: Positive = 0.1,
    lam_w: NonNegative = 1.0,
    lam_l: NonNegative = 1.0,
    z_ref: Context = 0.0,
) -> Tensor:
    """KTO, ``[B]``: ``lam_w * sigmoid(z_ref - beta * w.ratio) + lam_l * sigmoid(beta * l.ratio - z_ref)``.

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 7, with ``1 - sigmoid(x)`` written as ``sigmoid(-x)``. The table
    of the SimPO paper prints the second term with the opposite sign, which would raise rejected responses. ``z_ref``
    ``[]`` is the :func:`reference_point` of the optimizer step; 0 is its value while the policy is the reference.
    """
    return lam_w * torch.sigmoid(z_ref - beta * w.ratio) + lam_l * torch.sigmoid(beta * l.ratio - z_ref)


def kto_unpaired(
    y: Responses, label: Tensor, *, beta: float, lam_w: float, lam_l: float, z_ref: Tensor | float
) -> Tensor:
    """KTO on single responses, ``[B]``: the first term of :func:`kto` where ``label`` ``[B]`` is True, else the second.

    ``label`` is of type bool: whether the response is desirable.
    """
    below = z_ref - beta * y.ratio
    return torch.where(label, lam_w * torch.sigmoid(below), lam_l * torch.sigmoid(-below))


def reference_point(mean_ratio: Tensor, beta: float) -> Tensor:
    """KTO's ``z_ref``, ``[]``: ``beta * max(mean_ratio, 0)``, detached.

    Args:
        mean_ratio: ``[]`` mean of ``ratio`` over responses that belong to other prompts than those they are scored
            after, over the whole optimizer step; an estimate of KL(policy || reference), hence never below 0.
        beta: the row's hyperparameter.
    """
    return beta * mean_ratio.detach().clamp(min=0)
