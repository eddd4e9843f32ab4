"""Advice when memory runs out, and ``torch_compile`` for all lengths at once."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from simpo.errors import SimpoError

_CPU_MESSAGE = "can't allocate memory"  # of PyTorch's allocator, which has no exception of its own for it


_SPARE = 0.8  # of what has fitted: other batches are cut otherwise, and freed memory is not always in one piece


OUTSIDE_A_FORWARD = (
    "optim: memory ran out outside a micro-batch's forward and backward, where the optimizer's states are made; choose "
    "a smaller one (adamw_torch_8bit, adafactor) or share the states out over GPUs (recipes/launch)"
)


@contextmanager
def explain_oom(advise: Callable[[], str]) -> Iterator[None]:
    """Turn memory that runs out inside into what ``advise`` says once it has been freed.

    Raises:
        SimpoError: instead of PyTorch's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what had been computed
    else:
        return
    _release()
    raise SimpoError(advise()) from None


def tokens_that_fit(lengths: Sequence[int], longest: int, attempt: Callable[[list[int]], None] | None) -> str:
    """What to say of a micro-batch that did not fit, after trying smaller ones.

    Args:
        lengths: tokens of its rows.
        longest: tokens of the data's longest row, below which ``max_batch_tokens`` cannot be.
        attempt: computes some of the rows, given by their places; None where other processes would have to take part,
            and half of the rows are taken to fit.
    """
    tokens = sum(lengths)
    budget = tokens // 2
    while budget >= longest:
        rows = _filled(lengths, budget)
        if attempt is None or _fits(attempt, rows):
            found = max(longest, int(_SPARE * sum(lengths[row] for row in rows)))
            return f"max_batch_tokens: a micro-batch of {tokens} tokens does not fit into memory; set it to {found}"
        budget //= 2
    least = f"; set it to {longest}, the longest row, and" if tokens > longest else ":"
    return (
        f"max_batch_tokens: a micro-batch of {tokens} tokens does not fit into memory{least} set "
        "activation_checkpointing: true, lower max_length or choose a smaller type or model"
    )


def _filled(lengths: Sequence[int], budget: int) -> list[int]:
    """Rows, the longest first, that have at most ``budget`` tokens together."""
    rows, left = [], budget
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if lengths[row] <= left:
            rows.append(row)
            left -= lengths[row]
    return rows


def _fits(attempt: Callable[[list[int]], None], rows: list[int]) -> bool:
    try:
        with explain_oom(lambda: ""):
            attempt(rows)
    except SimpoError:
        return False
    return True


def _out_of_memory(error: Exception) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or _CPU_MESSAGE in str(error)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- ``torch_compile``: the model's layers compiled, each by itself and once for all lengths.


# Graphs of one function: transformers' layers of all kinds share one, each with and without gradients.
_MOST_GRAPHS = 64


def compile_layers(model: nn.Module, args: TrainingArguments, accelerator: Accelerator) -> None:
    """Compile the layers of ``model`` in place, and keep ``accelerator`` from compiling the whole.

    Layers of one kind share their compiled code, for any number of tokens. The rest of the forward looks at a batch's
    lengths in Python, and compiled it would be compiled again for every batch.

    Raises:
        SimpoError: the model has no layers of transformers' own kind.
    """
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SimpoError(f"torch_compile: {type(model).__name__} has no layers that could be compiled; set it to false")
    torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
