"""The ordered pairs of comparisons with K responses: every response with every one that is worse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OrderedPairs(NamedTuple):
    """Indices of the ``N`` ordered pairs of ``C`` comparisons with ``R`` responses in all.

    Attributes:
        better: ``[N]`` the preferred response of each pair.
        worse: ``[N]`` the other one.
        comparison: ``[N]`` which comparison a pair belongs to.
        share: ``[N]`` one over the number of pairs of that comparison, float64.
        best: ``[C]`` the best response of each comparison.
    """

    better: Tensor
    worse: Tensor
    comparison: Tensor
    share: Tensor
    best: Tensor

    @classmethod
    def of(cls, counts: Tensor, scores: Tensor | None = None) -> OrderedPairs:
        """All pairs whose first response has the higher score; equal scores make none.

        Args:
            counts: ``[C]`` responses of each comparison, ``K``; they may differ.
            scores: ``[R]``, the highest of each comparison first; None: the responses are in order, the best first.
        """
        first = counts.cumsum(0) - counts
        owner = torch.repeat_interleave(counts)  # [R]
        scores = -torch.arange(len(owner)) if scores is None else scores
        rivals = counts[owner]  # [R] of its own comparison, itself included
        better = torch.repeat_interleave(rivals)  # every response with each of them
        worse = torch.arange(len(better)) - (rivals.cumsum(0) - rivals - first[owner])[better]
        ordered = scores[better] > scores[worse]
        better, worse = better[ordered], worse[ordered]
        comparison = owner[better]
        share = 1 / torch.bincount(comparison, minlength=len(counts))[comparison].double()
        return cls(better, worse, comparison, share, first)

    def mean(self, values: Tensor) -> Tensor:
        """``[C, ...]`` means over the pairs of each comparison, of ``values`` ``[N, ...]``."""
        shared = values * self.share.to(values).view(-1, *[1] * (values.dim() - 1))
        return values.new_zeros(len(self.best), *values.shape[1:]).index_add(0, self.comparison, shared)
