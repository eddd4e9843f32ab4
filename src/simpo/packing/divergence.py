"""KL(policy || reference) of the next token, exact over the vocabulary, from hidden states and in chunks of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpo.packing.logprobs import MEBIBYTE, Head, product_dtype


def fused_kl(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head, *, chunk_bytes: int | None = None
) -> Tensor:
    """``[S]`` ``sum_v p(v) * (log p(v) - log q(v))``, ``p`` the policy, ``q`` the reference; fp32 (fp64 for fp64).

    Works through chunks of rows and keeps one number a row. Backward makes a chunk's logits again and turns them into
    ``p * (log p - log q - KL)``, the gradient with respect to the policy's. The reference gets no gradient.

    Args:
        hidden: ``[S, H]`` of the policy, any floating type; under autocast the products are taken in its type.
        head: the policy's output layer.
        ref_hidden: ``[S, H']`` of the reference.
        ref_head: the reference's output layer, over the same vocabulary.
        chunk_bytes: of a chunk's logits, of which there are about three at a time; default 64 MiB on a CPU, 512 MiB
            elsewhere.
    """
    if chunk_bytes is None:
        chunk_bytes = (64 if hidden.device.type == "cpu" else 512) * MEBIBYTE
    rows = max(1, chunk_bytes // (head.weight.shape[0] * max(4, hidden.element_size())))
    return _FusedKL.apply(hidden, head.weight, head.bias, head.scale, head.softcap, ref_hidden, ref_head, rows)


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [S, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        scale: float,
        softcap: float | None,
        ref_hidden: Tensor,  # [S, H']
        ref_head: Head,
        rows: int,
    ) -> Tensor:
        ctx.scale, ctx.softcap, ctx.rows, ctx.ref_head = scale, softcap, rows, ref_head
        ctx.dtype, ctx.ref_dtype = product_dtype(hidden), product_dtype(ref_hidden)
        head, found = Head(weight, bias, scale, softcap), []
        for mine, theirs in zip(hidden.split(rows), ref_hidden.split(rows), strict=True):
            p, log_ratio = _compare_(head.logits(mine, ctx.dtype), ref_head.logits(theirs, ctx.ref_dtype))
            found.append(p.mul_(log_ratio).sum(dim=-1))
        kl = torch.cat(found)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, kl)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ref_hidden, kl = ctx.saved_tensors
        head, exact = Head(weight, bias, ctx.scale, ctx.softcap), kl.dtype
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden: list[Tensor] = []
        # sums over chunks, in fp32 whatever the weights are
        d_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=exact) if wants_bias else None
        weight_cast = weight.to(ctx.dtype)
        parts = (tensor.split(ctx.rows) for tensor in (hidden, ref_hidden, kl, grad * ctx.scale))
        for mine, theirs, divergence, factor in zip(*parts, strict=True):
            logits = head.logits(mine, ctx.dtype)  # [c, V]
            slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
            p, log_ratio = _compare_(logits, ctx.ref_head.logits(theirs, ctx.ref_dtype))
            matrix = log_ratio.sub_(divergence[:, None]).mul_(p)
            matrix = (matrix if slope is None else matrix.mul_(slope)).to(ctx.dtype)
            # a row's factor goes to the narrow operand of each product, never over [c, V]
            if wants_hidden:
                d_hidden.append(((matrix @ weight_cast) * factor[:, None]).to(hidden.dtype))
            if d_weight is not None:
                d_weight += matrix.T @ (mine * factor[:, None]).to(ctx.dtype)
            if d_bias is not None:
                d_bias += factor.to(ctx.dtype) @ matrix
        return (
            torch.cat(d_hidden) if wants_hidden else None,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *[None] * 5,
        )


def _compare_(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn ``[c, V]`` logits of policy and reference, in place, into ``p`` and ``log p - log q``."""
    logp, ref_logp = (x.sub_(x.logsumexp(dim=-1, keepdim=True)) for x in (logits, ref_logits))
    log_ratio = torch.sub(logp, ref_logp, out=ref_logp)
    return logp.exp_(), log_ratio
