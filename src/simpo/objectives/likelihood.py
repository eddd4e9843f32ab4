"""The terms that several objectives share: the likelihood of a label, and that of the chosen response."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from simpo.objectives.hyperparameters import NonNegative
from simpo.objectives.responses import Responses


def preference_nll(margin: Tensor, label_smoothing: float) -> Tensor:
    """``[B]`` negative log-likelihood of the labels under Bradley-Terry, ``margin`` ``[B]`` in nats.

    ``label_smoothing`` is the probability that a label is wrong (Mitchell 2023, cDPO).
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def nll_term(w: Responses, *, lam: NonNegative = 1.0) -> Tensor:
    """Anchor on the chosen response, ``[B]``: ``-lam * w.logp``, a sum over its tokens."""
    return -lam * w.logp


def sft_term(w: Responses) -> Tensor:
    """Anchor on the chosen response, ``[B]``: ``-w.avg``; weighted by ``sft_weight`` beside any row.

    With SimPO it gives CPO-SimPO. Each pair counts alike here; the repository of the SimPO paper averages over the
    tokens of the device batch instead, which lets the longest responses dominate and depends on how a step is split.
    """
    return -w.avg
