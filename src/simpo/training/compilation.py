"""``torch_compile``: the model's layers compiled, each by itself and once for all lengths."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from simpo.errors import SimpoError

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
