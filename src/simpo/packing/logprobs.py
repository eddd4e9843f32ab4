"""Computes log-probabilities and exact KL from hidden states without materializing ``[tokens, vocabulary]``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MEBIBYTE = 2**20
# Bytes of logits computed at a time.
CPU_CHUNK, ACCELERATOR_CHUNK = 128 * MEBIBYTE, 1024 * MEBIBYTE


@dataclass(frozen=True)
class Head:
    """A model's output layer: ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``."""

    weight: Tensor  # `[V, H]`
    bias: Tensor | None = None  # `[V]` or None
    scale: float = 1.0  # factor on the logits (Cohere's `logit_scale`, or one over Granite's `logits_scaling`)
    softcap: float | None = None  # bound on the logits (Gemma 2 and 3), or None

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute logits ``[n, V]`` from ``hidden`` ``[n, H]``: the product in ``dtype``, the rest in at least fp32."""
        product = hidden.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            product = product + self.bias.to(dtype)
        logits = product.float() if dtype in (torch.bfloat16, torch.float16) else product
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def fused_logprobs(hidden: Tensor, head: Head, targets: Tensor, *, chunk_bytes: int | None = None) -> Tensor:
    """Compute log-probabilities of ``targets`` ``[S]`` given ``hidden`` ``[S, H]``: ``[S]`` in nats.

    The result is fp32 (fp64 for fp64). Works in chunks of rows whose logits take at most ``chunk_bytes`` (default: 128
    MiB on a CPU, 1 GiB elsewhere) and keeps one number per row. Backward recomputes a chunk's logits, turns them into
    ``(onehot - softmax) * grad`` in place, and accumulates the gradients of ``hidden``, weight and bias that are
    needed. The last chunk is kept and comes first in backward: this avoids recomputing it, and peak memory stays at
    one chunk. Matrix products use autocast's dtype if it is on.
    """
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK if hidden.device.type == "cpu" else ACCELERATOR_CHUNK
    row_bytes = head.weight.shape[0] * max(4, hidden.element_size())
    chunks = max(1, -(-len(targets) // max(1, chunk_bytes // row_bytes)))
    rows = max(1, -(-len(targets) // chunks))  # nearly equal chunks, so that the one that is kept is not tiny
    return _FusedLogprobs.apply(hidden, head.weight, head.bias, head.scale, head.softcap, targets, rows)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with ``hidden``: autocast's if it is on, otherwise its own."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _FusedLogprobs(torch.autograd.Function):
    """Maps ``hidden`` ``[S, H]``, ``weight`` ``[V, H]``, ``bias`` ``[V]`` and ``targets`` ``[S]`` to ``[S]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any) -> Tensor:
        scale, softcap, targets, rows = constants
        dtype = product_dtype(hidden)
        head = Head(weight.to(dtype), bias, scale, softcap)  # cast once instead of for every chunk
        ctx.scale, ctx.softcap, ctx.dtype, ctx.rows = scale, softcap, dtype, rows
        logps, matrix = [], None
        for states, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
            matrix = None  # free the previous chunk before computing the next
            matrix = head.logits(states, dtype)  # [c, V] logits, then probabilities
            picked = matrix.gather(-1, ids[:, None]).squeeze(-1)
            logps.append(picked - _softmax_(matrix))
        ctx.save_for_backward(hidden, weight, bias, targets)
        # a softcap's derivative depends on the logits, which have been overwritten, so that chunk is recomputed too
        keep = softcap is None and any(ctx.needs_input_grad)
        ctx.kept = matrix if keep else None
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        head = Head(weight.to(ctx.dtype), bias, ctx.scale, ctx.softcap)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight, d_bias = None, None
        chunked = len(targets) > ctx.rows
        for start in reversed(range(0, len(targets), ctx.rows)):
            chunk = slice(start, start + ctx.rows)
            kept, ctx.kept = ctx.kept, None  # overwritten below, so a second backward must recompute it
            matrix = _d_product(head, hidden[chunk], targets[chunk], kept, ctx.dtype)  # [c, V]
            # scale rows of the narrow operand of each product, not of the [c, V] matrix
            factor = (grad[chunk] * -ctx.scale)[:, None]  # [c, 1]
            if d_hidden is not None:
                d_hidden[chunk] = ((matrix @ head.weight) * factor).to(hidden.dtype)
            narrow = (hidden[chunk] * factor).to(ctx.dtype)
            if wants_weight:
                d_weight = _accumulate(d_weight, matrix.T, narrow, chunked)
            if wants_bias:
                d_bias = _accumulate(d_bias, factor.T.to(ctx.dtype), matrix, chunked)  # [1, V]
            del kept, matrix  # before computing the next chunk
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias[0].to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _softmax_(logits: Tensor) -> Tensor:
    """Turn ``logits`` ``[c, V]`` into probabilities in place and return their log-normalizer ``[c]``.

    Relative to the largest logit, the normalizer is one over the largest probability. That is at least 1 / V, so its
    logarithm is accurate, whereas a target's probability may underflow.
    """
    largest = logits.amax(dim=-1)
    torch.softmax(logits, dim=-1, out=logits)
    return largest - logits.amax(dim=-1).log()


def _d_product(head: Head, hidden: Tensor, targets: Tensor, probabilities: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute ``softmax - onehot`` (times the derivative of the softcap), ``[c, V]`` in ``dtype``.

    This is the negative gradient of the log-probabilities with respect to ``scale * (h W^T + b)``. ``probabilities``
    ``[c, V]`` are overwritten; if None, they are recomputed.
    """
    slope = None
    if probabilities is None:
        probabilities = head.logits(hidden, dtype)
        if head.softcap is not None:
            slope = 1 - (probabilities / head.softcap).square_()
        _softmax_(probabilities)
    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
    return (probabilities if slope is None else probabilities.mul_(slope)).to(dtype)


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor, chunked: bool) -> Tensor:
    """Return ``total + left @ right``; half-precision products of several chunks are summed in fp32."""
    if total is None:
        product = left @ right
        return product.float() if chunked and product.dtype.itemsize < 4 else product
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)


# ---- KL(policy || reference) of the next token, exact over the vocabulary.


def fused_kl(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head, *, chunk_bytes: int | None = None
) -> Tensor:
    """Compute ``sum_v p(v) * (log p(v) - log q(v))``, ``[S]``, for policy ``p`` and reference ``q``.

    The policy's ``hidden`` ``[S, H]`` and the reference's ``ref_hidden`` ``[S, H']`` predict the same vocabulary; the
    result is fp32 (fp64 for fp64). Works in chunks of rows and keeps one number per row. Backward recomputes a chunk's
    logits and turns them into ``p * (log p - log q - KL)``, the gradient with respect to the policy's logits. The
    reference gets no gradient. ``chunk_bytes`` (default: 64 MiB on a CPU, 512 MiB elsewhere) bounds a chunk's logits;
    about three such buffers exist at a time.
    """
    rows = _rows_of_half_a_chunk(hidden, head, chunk_bytes)
    return _FusedKL.apply(hidden, head.weight, head.bias, head.scale, head.softcap, ref_hidden, ref_head, rows)


def fused_entropy(hidden: Tensor, head: Head, *, chunk_bytes: int | None = None) -> Tensor:
    """Compute the entropy of the next token given ``hidden`` ``[S, H]``: ``[S]`` in nats.

    It is ``log V - KL(policy || uniform)``. ``chunk_bytes`` is as in :func:`fused_kl`.
    """
    vocabulary = len(head.weight)
    uniform = Head(hidden.new_zeros(vocabulary, 1))
    states = hidden.new_zeros(len(hidden), 1)
    return math.log(vocabulary) - fused_kl(hidden, head, states, uniform, chunk_bytes=chunk_bytes)


@torch.no_grad()
def fused_log_collision(hidden: Tensor, head: Head, *, chunk_bytes: int | None = None) -> Tensor:
    """Compute ``log sum_v p(v)**2``, ``[S]``, for the next token's distribution given ``hidden`` ``[S, H]``.

    This is the log-probability that two tokens drawn from ``p`` are equal; it has no gradient. ``chunk_bytes`` is as in
    :func:`fused_kl`.
    """
    dtype, collisions = product_dtype(hidden), []
    head = replace(head, weight=head.weight.to(dtype))
    for states in hidden.split(_rows_of_half_a_chunk(hidden, head, chunk_bytes)):
        logits = head.logits(states, dtype)
        normalizer = logits.logsumexp(dim=-1)
        collisions.append(logits.mul_(2).logsumexp(dim=-1) - 2 * normalizer)
    return torch.cat(collisions)


def _rows_of_half_a_chunk(hidden: Tensor, head: Head, chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        chunk_bytes = (CPU_CHUNK if hidden.device.type == "cpu" else ACCELERATOR_CHUNK) // 2
    return max(1, chunk_bytes // (head.weight.shape[0] * max(4, hidden.element_size())))


class _FusedKL(torch.autograd.Function):
    """Maps ``hidden`` ``[S, H]``, ``weight`` ``[V, H]``, ``bias`` ``[V]`` and ``ref_hidden`` ``[S, H']`` to ``[S]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any) -> Tensor:
        scale, softcap, ref_hidden, ref_head, rows = constants
        ctx.scale, ctx.softcap, ctx.rows, ctx.ref_head = scale, softcap, rows, ref_head
        ctx.dtype, ctx.ref_dtype = product_dtype(hidden), product_dtype(ref_hidden)
        head, divergences = Head(weight.to(ctx.dtype), bias, scale, softcap), []
        ref_head = replace(ref_head, weight=ref_head.weight.to(ctx.ref_dtype))
        for states, ref_states in zip(hidden.split(rows), ref_hidden.split(rows), strict=True):
            p, log_ratio = _compare_(head.logits(states, ctx.dtype), ref_head.logits(ref_states, ctx.ref_dtype))
            divergences.append(p.mul_(log_ratio).sum(dim=-1))
        kl = torch.cat(divergences)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, kl)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ref_hidden, kl = ctx.saved_tensors
        head, exact = Head(weight.to(ctx.dtype), bias, ctx.scale, ctx.softcap), kl.dtype
        ref_head = replace(ctx.ref_head, weight=ctx.ref_head.weight.to(ctx.ref_dtype))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden: list[Tensor] = []
        # summed over chunks in fp32, whatever the dtype of the weights
        d_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=exact) if wants_bias else None
        parts = (tensor.split(ctx.rows) for tensor in (hidden, ref_hidden, kl, grad * ctx.scale))
        for states, ref_states, divergence, factor in zip(*parts, strict=True):
            logits = head.logits(states, ctx.dtype)  # [c, V]
            slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
            p, log_ratio = _compare_(logits, ref_head.logits(ref_states, ctx.ref_dtype))
            matrix = log_ratio.sub_(divergence[:, None]).mul_(p)
            matrix = (matrix if slope is None else matrix.mul_(slope)).to(ctx.dtype)
            # scale rows of the narrow operand of each product, not of the [c, V] matrix
            if wants_hidden:
                d_hidden.append(((matrix @ head.weight) * factor[:, None]).to(hidden.dtype))
            if d_weight is not None:
                d_weight += matrix.T @ (states * factor[:, None]).to(ctx.dtype)
            if d_bias is not None:
                d_bias += factor.to(ctx.dtype) @ matrix
        return (
            torch.cat(d_hidden) if wants_hidden else None,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *[None] * 5,
        )


def _compare_(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the logits ``[c, V]`` of policy and reference into ``p`` and ``log p - log q``, in place."""
    logp, ref_logp = (x.sub_(x.logsumexp(dim=-1, keepdim=True)) for x in (logits, ref_logits))
    log_ratio = torch.sub(logp, ref_logp, out=ref_logp)
    return logp.exp_(), log_ratio
