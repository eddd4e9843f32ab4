"""Losses of reward models, which assign one number to a prompt with a response."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """``[N]`` negative log-likelihood of preferences, from the rewards, ``[N]``, of both responses of ``N`` pairs.

    ``-logsigmoid(chosen - rejected - margin)``: Ouyang et al. 2022, arXiv 2203.02155, equation 1, whose weight of
    ``1 / C(K, 2)`` is the mean over the pairs of one prompt; the margin is that of Touvron et al. 2023, arXiv
    2307.09288, equation 2.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``[N]`` ``(chosen + rejected)**2``, which pulls the mean reward towards 0.

    Preferences do not determine a constant that is added to all rewards. Eisenstein et al. 2023, arXiv 2312.09244.
    """
    return (chosen + rejected) ** 2
