"""Activation checkpointing of some of the layers: memory is bought with arithmetic only as far as it is needed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


class CheckpointShare(TrainerCallback):
    """Leaves ``activation_checkpointing`` on for ``share`` of the layers, spread evenly.

    A layer without it keeps its activations, and its forward is not computed again in backward.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Called after ``Trainer`` has switched it on for all."""
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for number, layer in enumerate(layers):
            chosen = int((number + 1) * self._share) > int(number * self._share)
            layer.gradient_checkpointing = layer.gradient_checkpointing and chosen
