"""Log-probabilities of chosen tokens from hidden states, without ever holding ``[tokens, vocabulary]``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Head:
    """A model's output layer: ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: bound of the logits (Gemma 2 and 3), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """``[n, V]`` logits of ``hidden`` ``[n, H]``; the product in ``dtype``, the rest in fp32 at least."""
        product = hidden.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            product = product + self.bias.to(dtype)
        logits = product.float() if dtype in (torch.bfloat16, torch.float16) else product
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def plain_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """``[S]`` log-probabilities of ``targets`` ``[S]`` given ``hidden`` ``[S, H]``: the definition, as an oracle."""
    logits = head.logits(hidden, _product_dtype(hidden))
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def fused_logprobs(hidden: Tensor, head: Head, targets: Tensor, *, chunk_bytes: int | None = None) -> Tensor:
    """``[S]`` log-probabilities, in nats, of ``targets`` ``[S]`` given ``hidden`` ``[S, H]``; fp32 (fp64 for fp64).

    Works through chunks of rows whose logits take at most ``chunk_bytes`` and keeps one number a row. Backward makes a
    chunk's logits again, turns them into ``(onehot - softmax) * grad`` in place and adds the products into the
    gradients of ``hidden``, weight and bias (those that ask for one). When all rows fit into one chunk its logits are
    kept instead, which saves the second product.

    Args:
        hidden: ``[S, H]``, any floating type; under autocast the products are taken in its type.
        head: the output layer.
        targets: ``[S]`` token ids.
        chunk_bytes: default 128 MiB on a CPU, 1 GiB elsewhere.
    """
    if chunk_bytes is None:
        chunk_bytes = (128 if hidden.device.type == "cpu" else 1024) * MEBIBYTE
    row_bytes = head.weight.shape[0] * max(4, hidden.element_size())
    rows = max(1, chunk_bytes // row_bytes)
    return _FusedLogprobs.apply(hidden, head.weight, head.bias, head.scale, head.softcap, targets, rows)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _chunks(total: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, total)) for start in range(0, total, rows))


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [S, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        scale: float,
        softcap: float | None,
        targets: Tensor,  # [S]
        rows: int,
    ) -> Tensor:
        head, dtype = Head(weight, bias, scale, softcap), _product_dtype(hidden)
        ctx.scale, ctx.softcap, ctx.dtype, ctx.rows = scale, softcap, dtype, rows
        picked, normalizer, logits = [], [], None
        for chunk in _chunks(len(targets), rows):
            logits = head.logits(hidden[chunk], dtype)  # [c, V]
            picked.append(logits.gather(-1, targets[chunk, None]).squeeze(-1))
            normalizer.append(torch.logsumexp(logits, dim=-1))
        lse = torch.cat(normalizer)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.kept = logits if len(targets) <= rows and any(ctx.needs_input_grad) else None
        return torch.cat(picked) - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # several chunks' contributions to a half-precision weight are summed in fp32
        total = torch.float32 if len(targets) > ctx.rows and weight.dtype.itemsize < 4 else weight.dtype
        d_weight = torch.zeros_like(weight, dtype=total) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=total) if wants_bias else None
        weight_cast = weight.to(ctx.dtype)
        for chunk in _chunks(len(targets), ctx.rows):
            kept, ctx.kept = ctx.kept, None  # overwritten below, so a second backward makes it again
            logits = head.logits(hidden[chunk], ctx.dtype) if kept is None else kept
            d_product = _d_product(logits, targets[chunk], lse[chunk], grad[chunk], head).to(ctx.dtype)  # [c, V]
            if d_hidden is not None:
                d_hidden[chunk] = d_product @ weight_cast
            if d_weight is not None:
                _add_product(d_weight, d_product.T, hidden[chunk].to(ctx.dtype))
            if d_bias is not None:
                d_bias += d_product.sum(0)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _d_product(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, head: Head) -> Tensor:
    """``[c, V]`` gradient of the chunk's product ``h W^T + b``; ``logits`` ``[c, V]`` is overwritten."""
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square()
    d_logits = logits.sub_(lse[:, None]).exp_().neg_()  # -softmax
    d_logits[torch.arange(len(targets), device=targets.device), targets] += 1
    d_logits *= grad[:, None] * head.scale
    return d_logits if slope is None else d_logits.mul_(slope)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in one call where the types agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
