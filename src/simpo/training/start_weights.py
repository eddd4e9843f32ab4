"""The weights that training started from, beside those that are trained: both change places for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from simpo.training.sharding import reshard
from simpo.training.zero import exchange_partitions, is_partitioned

_START = "_simpo_start"


def add_reference(model: nn.Module) -> None:
    """Keep a copy of what ``model`` trains as it is now, for :func:`reference_of`: with an adapter, of that alone.

    Call it before anything has been trained or read from a checkpoint, when the model is on its device, and sharded if
    it is going to be: then every rank keeps its shards.
    """
    own = [parameter.ds_tensor if is_partitioned(parameter) else parameter for parameter in _trained(model)]
    setattr(model, _START, [tensor.detach().clone() for tensor in own])


@contextmanager
def reference_of(model: nn.Module) -> Iterator[None]:
    """``model`` is the policy that training started from, without dropout and gradients, while this lasts.

    Of a new adapter that is the base model, of a continued one the adapter as it was. The weights that are trained
    change places with their copy: there is no second adapter to be switched to, frozen, or left out of what is saved.
    """
    trained, training = _trained(model), model.training
    now = _exchange(trained, getattr(model, _START))
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        reshard(model)  # what has been gathered is the start's
        _exchange(trained, now)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    reshard(model)  # a forward without a backward leaves weights gathered in part
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _exchange(parameters: list[nn.Parameter], data: list[Tensor]) -> list[Tensor]:
    """Give every parameter its ``data``; returns what gives them back what they had."""
    if parameters and is_partitioned(parameters[0]):
        exchange_partitions(parameters, data)
        return data
    before = [_give(parameter, tensor) for parameter, tensor in zip(parameters, data, strict=True)]
    torch.clear_autocast_cache()  # it knows a weight's half-precision copy by the parameter, not by its data
    return before


@torch.no_grad()
def _give(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):  # FSDP gathers from memory of its own: the numbers change places in it
        own, other = parameter.to_local(), tensor.to_local()  # type: ignore[attr-defined]
        numbers = own.clone()
        own.copy_(other)
        other.copy_(numbers)
        return tensor
    before, parameter.data = parameter.data, tensor
    return before
