"""The inputs of objectives: log-probabilities and lengths of responses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Odds are infinite where a probability rounds to 1; an average log-probability is kept at least this far below 0.
_CERTAIN = 1e-12


@dataclass(frozen=True)
class Responses:
    """Log-probabilities of ``B`` responses.

    Attributes:
        logp: ``[B]`` sum over the scored tokens of ``log pi(y_t | x, y_<t)``, in nats.
        length: ``[B]`` number of scored tokens ``|y|``, the end-of-turn token included.
        ref_logp: ``[B]`` the same sum under the reference model, for objectives that need one.
    """

    logp: Tensor
    length: Tensor
    ref_logp: Tensor | None = None

    def take(self, index: Tensor) -> Responses:
        """The responses with these numbers, ``[N]``."""
        columns = (self.logp, self.length, self.ref_logp)
        return Responses(*(None if column is None else column.index_select(0, index) for column in columns))

    @property
    def avg(self) -> Tensor:
        """``[B]`` average log-probability of a token, ``logp / |y|``: SimPO's reward over beta (eq. 4)."""
        return self.logp / self.length

    @property
    def ratio(self) -> Tensor:
        """``[B]`` ``log pi(y|x) - log pi_ref(y|x)``.

        Raises:
            ValueError: there is no ``ref_logp``.
        """
        if self.ref_logp is None:
            raise ValueError("this objective compares the policy with a reference, and ref_logp is missing")
        return self.logp - self.ref_logp

    @property
    def avg_ratio(self) -> Tensor:
        """``[B]`` ``ratio / |y|``: the log-ratio of an average token. Raises ``ValueError`` as ``ratio`` does."""
        return self.ratio / self.length

    @property
    def log_odds(self) -> Tensor:
        """``[B]`` ``log(p / (1 - p))`` of the geometric-mean token probability ``p = exp(avg)`` (ORPO, eq. 4).

        Stable over the whole range: ``1 - exp(avg)`` is computed with ``expm1`` near ``avg = 0`` and with ``log1p``
        far from it, and neither branch feeds an infinite gradient into the other. An average that rounds to 0, where
        odds and slope are infinite, is replaced by ``-1e-12``.
        """
        avg = self.avg
        avg = avg - (avg + _CERTAIN).clamp(min=0).detach()  # the slope with respect to it stays 1
        near_zero = avg > -math.log(2.0)
        # each branch gets a harmless argument where the other one is used: 0 * inf would be NaN in backward
        small = torch.where(near_zero, avg, torch.full_like(avg, -1.0))
        large = torch.where(near_zero, torch.full_like(avg, -1.0), avg)
        log_one_minus_p = torch.where(near_zero, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
        return avg - log_one_minus_p
