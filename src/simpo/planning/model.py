"""Collects the settings that determine a step's memory and cost, and builds the model on the meta device."""

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
from simpo.packing.selfcheck import ATTENTION_TYPES, Path
from simpo.training.callbacks import checkpointed_layers


@dataclass(frozen=True)
class Blueprint:
    """Everything that determines the memory and cost of a step, apart from its micro-batch."""

    arguments: ModelArguments  # the model, how to load it, and its adapter
    config: Any  # the model's configuration
    dtype: torch.dtype  # dtype of weights that are not in 4 bits
    reward: bool = False  # whether it is a reward model
    path: ForwardPath = "auto"  # how batches are computed
    checkpointed_share: float = 0.0  # fraction of the layers that recompute their activations; 0 without checkpointing
    optimizer: str = "adamw_torch_fused"  # transformers' name of the optimizer
    cuda: bool = False  # whether it runs on a GPU, with GPU kernels
    autocast: torch.dtype | None = None  # dtype of matrix products under autocast; None without autocast
    accumulates: bool = False  # whether gradients of an earlier micro-batch are already allocated
    share: float = 1.0  # fraction of the layers' gradients that one process keeps
    sharded: bool = False  # whether processes shard the weights
    reference: bool = False  # whether every forward also computes a reference from a copy of the trained weights
    divergence: bool = False  # whether the loss includes the KL divergence from the reference
    pair_weights: bool = False  # whether pairs are weighted by the policy's probabilities

    @classmethod
    def read(cls, arguments: ModelArguments, **others: Any) -> Blueprint:
        """Create a blueprint from a model configuration on disk or on the hub; no weights are read."""
        config = load_config(arguments)
        stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
        return cls(
            arguments,
            config,
            stored if arguments.dtype == "auto" else getattr(torch, arguments.dtype or "float32"),
            **others,
        )

    def batch_path(self) -> Path:
        """Return the path that batches take, judging by the configuration."""
        path = state_of(prepare_policy(self.build()[0])).path
        assert path is not None
        return path

    def recomputes_comparisons(self) -> bool:
        """Whether checkpoints contain all layers for one comparison, as on the cached path, instead of one layer."""
        return self.checkpointed_share > 0 and self.batch_path() == "cached"

    def layer_groups(self) -> list[list[int]]:
        """Group the layers by kind: the indices of each kind's layers, in order of first appearance."""
        groups: dict[Any, list[int]] = {}
        layers = _layers(self._untrained())
        checkpointed = checkpointed_layers(len(layers), self.checkpointed_share)
        for number, (layer, recomputed) in enumerate(zip(layers, checkpointed, strict=True)):
            shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
            windows = [getattr(module, "sliding_window", None) for module in layer.modules()]
            key = (type(layer), shapes, tuple(window for window in windows if isinstance(window, int)), recomputed)
            groups.setdefault(key, []).append(number)
        return list(groups.values())

    def build(self, numbers: Sequence[int] | None = None) -> tuple[Any, list[nn.Module]]:
        """Build the model for training, on the meta device, and return it with its layers.

        ``numbers`` are the indices of the layers to keep; None keeps all.
        """
        model = self._untrained()
        layers = _layers(model)
        checkpointed = checkpointed_layers(len(layers), self.checkpointed_share)
        for layer, recomputed in zip(layers, checkpointed, strict=True):
            layer.gradient_checkpointing = recomputed
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        if numbers is not None:
            _keep_layers(model, layers, numbers)
        if self.arguments.quantization:
            _quantize(model, self.dtype)
        with torch.device("meta"):
            model = self._adapted(model)
        freeze_parts_unused_by_text(model)
        disable_dropout(model)
        self._choose_path(model)
        return model, list(layers)

    def _untrained(self) -> Any:
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if hasattr(text, "num_local_experts") or hasattr(text, "num_experts"):
            text._experts_implementation = config._experts_implementation = "grouped_mm"  # shapes independent of values
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

    def _choose_path(self, model: Any) -> None:
        """Choose the path that batches will probably take, judging by the architecture alone."""
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
    """Return the layers of the language model."""
    lists = [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer)
    ]
    if not lists:
        raise SimpoError(f"model_name_or_path: cannot plan for {type(model).__name__}: it has no list of layers")
    return max(lists, key=len)


_LAYER_TYPES = ("layer_types", "layers_block_type")  # a configuration's attributes, or its properties


def _keep_layers(model: Any, layers: nn.ModuleList, numbers: Sequence[int]) -> None:
    """Keep only the layers at the indices ``numbers``, in ``model`` and in its configuration."""
    total = len(layers)
    kept = [layers[number] for number in numbers]
    del layers[:]
    layers.extend(kept)
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its index in a cache
                module.layer_idx = place
    config = model.config.get_text_config()
    derived: dict[str, list[Any]] = {}  # properties that compute the entries from other numbers, such as a period
    for name in {config.attribute_map.get(name, name) for name in (*vars(config), *_LAYER_TYPES)}:
        value = getattr(config, name, None)
        if isinstance(value, list) and len(value) == total:  # one entry per layer
            entries = [value[number] for number in numbers]
            if isinstance(getattr(type(config), name, None), property):
                derived[name] = entries
            else:
                setattr(config, name, entries)
    if not isinstance(getattr(type(config), "num_hidden_layers", None), property):
        config.num_hidden_layers = len(numbers)
    config.__class__ = type(type(config).__name__, (type(config),), derived)


# ---- Weights in 4 bits.

_FOUR_BIT, _SCALES = 0.5, 4 / 64  # bytes per weight: the 4 bits, and the fp32 scale that 64 weights share
_NESTED_SCALES = 1 / 64 + 4 / (64 * 256)  # bytes per weight of 8-bit scales and of their own scales


class _DequantizedProduct(torch.autograd.Function):
    """A matrix product whose weights are dequantized temporarily, in both forward and backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return states @ weight.clone().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return grad @ weight.clone(), None


class _FourBitLinear(nn.Linear):
    """Allocates memory like a bitsandbytes linear layer, except that its stored weight has the dequantized size."""

    def forward(self, states: Tensor) -> Tensor:
        return _DequantizedProduct.apply(states.to(self.weight.dtype), self.weight).to(states.dtype)


def _quantize(model: Any, dtype: torch.dtype) -> None:
    """Quantize all linear layers except the output layer to 4 bits; everything else becomes fp32, as for training."""
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
    """Return the bytes of all weights and buffers of a :class:`Blueprint`'s model; ``nested`` means 8-bit scales."""
    four_bit = _FOUR_BIT + (_NESTED_SCALES if nested else _SCALES)
    quantized = {id(module.weight) for module in model.modules() if isinstance(module, _FourBitLinear)}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * four_bit if key in quantized else float(t.nbytes) for key, t in tensors.items())
