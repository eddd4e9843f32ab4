"""The settings that determine the memory and cost of a step, and a model on the meta device with those shapes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from simpo.errors import SimpoError
from simpo.models.adapters import add_adapter, disable_dropout, find_adapter, freeze_parts_unused_by_text
from simpo.models.checkpoint import load_config
from simpo.models.loading import auto_class
from simpo.models.settings import ModelArguments
from simpo.packing.attention import UnsupportedAttentionError, causal_lm, install
from simpo.packing.model import ForwardPath, find_head, is_reward_model, prepare_policy, state_of
from simpo.packing.selfcheck import ATTENTION_TYPES
from simpo.training.callbacks import checkpointed_layers


@dataclass(frozen=True)
class Blueprint:
    """Everything that determines the memory and cost of a step, apart from its micro-batch."""

    arguments: ModelArguments  # which model, how it is loaded, and its adapter
    config: Any  # its configuration
    dtype: torch.dtype  # of its weights, where they are not in 4 bits
    reward: bool = False  # whether it is a reward model
    path: ForwardPath = "auto"  # how batches are computed
    checkpointed_share: float = 0.0  # share of the layers that compute their activations again; 0 without checkpointing
    optimizer: str = "adamw_torch_fused"  # transformers' name of it
    cuda: bool = False  # whether on a GPU, with its kernels
    autocast: torch.dtype | None = None  # the type of products under autocast; None without
    accumulates: bool = False  # whether gradients of an earlier micro-batch are there already
    # Of the gradients of layers that a process keeps: one over the number of processes that share them.
    share: float = 1.0
    reference: bool = False  # whether a copy of the trained weights computes the reference in every forward
    divergence: bool = False  # whether the KL divergence from it is part of the loss
    pair_weights: bool = False  # whether pairs are weighed by the policy's probabilities

    @classmethod
    def read(cls, arguments: ModelArguments, **others: Any) -> Blueprint:
        """Build it from a model configuration on disk or on the hub and further fields; no weights are read."""
        config = load_config(arguments)
        own = getattr(config.get_text_config(), "dtype", None) or torch.float32
        return cls(
            arguments,
            config,
            own if arguments.dtype == "auto" else getattr(torch, arguments.dtype or "float32"),
            **others,
        )

    def kinds(self) -> list[list[int]]:
        """The numbers of the layers of each kind, in the order of their first ones."""
        found: dict[Any, list[int]] = {}
        layers = _layers(self._untrained())
        checkpointed = checkpointed_layers(len(layers), self.checkpointed_share)
        for number, (layer, again) in enumerate(zip(layers, checkpointed, strict=True)):
            shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
            windows = [getattr(module, "sliding_window", None) for module in layer.modules()]
            key = (type(layer), shapes, tuple(window for window in windows if isinstance(window, int)), again)
            found.setdefault(key, []).append(number)
        return list(found.values())

    def build(self, numbers: Sequence[int] | None = None) -> tuple[Any, list[nn.Module]]:
        """The model as it is trained, on the meta device, with these layers alone if given; and its layers."""
        model = self._untrained()
        layers = _layers(model)
        again = checkpointed_layers(len(layers), self.checkpointed_share)
        for layer, chosen in zip(layers, again, strict=True):
            layer.gradient_checkpointing = chosen
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        if numbers is not None:
            _keep_layers(model, layers, numbers)
        if self.arguments.quantization:
            _to_four_bits(model, self.dtype)
        with torch.device("meta"):
            model = self._adapted(model)
        freeze_parts_unused_by_text(model)
        disable_dropout(model)
        self._settle(model)
        return model, list(layers)

    def _untrained(self) -> Any:
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if hasattr(text, "num_local_experts") or hasattr(text, "num_experts"):
            text._experts_implementation = config._experts_implementation = "grouped_mm"  # shapes without numbers
        kind = AutoModelForSequenceClassification if self.reward else auto_class(config)
        if self.reward:
            config.num_labels = 1
        with torch.device("meta"), no_init_weights():
            model = kind.from_config(config, dtype=self.dtype, trust_remote_code=self.arguments.trust_remote_code)
        model.tie_weights()
        return model

    def _adapted(self, model: Any) -> Any:
        adapter = find_adapter(self.arguments.model_name_or_path, self.arguments.model_revision)
        if adapter is not None:
            adapter.inference_mode = False
            return get_peft_model(model, adapter)
        return add_adapter(model, self.arguments.lora) if self.arguments.use_peft else model

    def _settle(self, model: Any) -> None:
        """Take the path that batches will take, as far as that shows without numbers."""
        inner = prepare_policy(model)
        state = state_of(inner)
        state.fused_head = is_reward_model(inner) or find_head(inner) is not None
        state.path = "padded" if self.path == "padded" else "cached"
        kinds = getattr(causal_lm(inner).config.get_text_config(), "layer_types", None) or ()
        if self.path in ("auto", "packed") and set(kinds) <= ATTENTION_TYPES:
            with suppress(UnsupportedAttentionError):
                install(inner)
                state.path = "packed"


def _layers(model: Any) -> nn.ModuleList:
    """The layers of the language model."""
    lists = [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer)
    ]
    if not lists:
        raise SimpoError(f"model_name_or_path: {type(model).__name__} has no list of layers that could be planned")
    return max(lists, key=len)


def _keep_layers(model: Any, layers: nn.ModuleList, numbers: Sequence[int]) -> None:
    """Leave these layers only, in ``model`` and in its configuration."""
    total = len(layers)
    kept = [layers[number] for number in numbers]
    del layers[:]
    layers.extend(kept)
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in a cache
                module.layer_idx = place
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:  # one entry per layer
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)


# ---- Weights in 4 bits.

_FOUR_BIT, _SCALES = 0.5, 4 / 64  # bytes of a weight in 4 bits, and its share of its block's fp32 scale
_NESTED_SCALES = 1 / 64 + 4 / (64 * 256)  # scales in 8 bits, and their own


class _FromFourBits(torch.autograd.Function):
    """A product with weights that are written out for it, forward and backward, and not kept."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return states @ weight.clone().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return grad @ weight.clone(), None


class _FourBitLinear(nn.Linear):
    """Has the memory of a linear layer of bitsandbytes, except that its weight is as large as the one written out."""

    def forward(self, states: Tensor) -> Tensor:
        return _FromFourBits.apply(states.to(self.weight.dtype), self.weight).to(states.dtype)


def _to_four_bits(model: Any, dtype: torch.dtype) -> None:
    """Quantize all linear layers but the output layer; everything else becomes fp32, as for training."""
    output = model.get_output_embeddings()
    compute = torch.bfloat16 if dtype == torch.float32 else dtype
    for module in model.modules():
        if type(module) is nn.Linear and module is not output:
            module.__class__ = _FourBitLinear
            module.weight.data = module.weight.data.to(compute)
        else:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.float()
    for weight in model.parameters():
        weight.requires_grad_(False)


def stored_bytes(model: Any, *, nested: bool) -> float:
    """Bytes of the weights and buffers of a :class:`Blueprint`'s model, where scales have 8 bits if ``nested``."""
    four_bit = _FOUR_BIT + (_NESTED_SCALES if nested else _SCALES)
    small = {id(module.weight) for module in model.modules() if isinstance(module, _FourBitLinear)}
    each = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * four_bit if name in small else float(t.nbytes) for name, t in each.items())
