"""The losses and implicit rewards, one function a row of the table; each reads like its paper.

``w`` and ``l`` are the :class:`~simpo.objectives.responses.Responses` of the chosen (winning) and rejected (losing)
responses of ``B`` pairs. A loss is ``[B]`` and unreduced; a reward is ``[B]``. Keyword-only parameters are the
hyperparameters: their names, types, defaults and bounds are read from the signature, and nothing else declares them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from simpo.objectives.hyperparameters import NonNegative, Positive, Smoothing
from simpo.objectives.responses import Responses

Link = Literal["sigmoid", "hinge"]


def preference_nll(margin: Tensor, label_smoothing: float) -> Tensor:
    """``[B]`` negative log-likelihood of the labels under Bradley-Terry, ``margin`` ``[B]`` in nats.

    ``label_smoothing`` is the probability that a label is wrong (Mitchell 2023, cDPO).
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def simpo(
    w: Responses,
    l: Responses,  # noqa: E741 - the papers' w and l
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: NonNegative = 0.5,
    link: Link = "sigmoid",
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """SimPO, ``[B]``: ``-log sigmoid(beta * (w.avg - l.avg) - gamma)`` with ``gamma = beta * gamma_beta_ratio``.

    Meng, Xia, Chen 2024, arXiv 2405.14734, equation 6. ``link="hinge"`` is the ``relu(1 - margin)`` of the paper's
    repository; it has no probability of a wrong label, so ``label_smoothing`` is refused beside it.

    Raises:
        ValueError: ``label_smoothing`` with the hinge link.
    """
    margin = beta * (w.avg - l.avg - gamma_beta_ratio)
    if link == "hinge":
        if label_smoothing:
            raise ValueError("label_smoothing is defined for link 'sigmoid', not for 'hinge'; set it to 0")
        return torch.relu(1 - margin)
    return preference_nll(margin, label_smoothing)


def simpo_reward(y: Responses, *, beta: Positive = 2.0) -> Tensor:
    """SimPO's implicit reward, ``[B]``: ``beta * avg`` (equation 4 of the paper)."""
    return beta * y.avg


def sft_term(w: Responses) -> Tensor:
    """``[B]`` negative average log-probability of the chosen response, weighted by ``sft_weight`` beside any row.

    With :func:`simpo` it gives CPO-SimPO. Each pair counts alike here; the paper's repository averages over the tokens
    of the device batch instead, which lets the longest responses dominate and depends on how a step is split.
    """
    return -w.avg
