"""A model with the shapes of a recipe's and no numbers: few of its layers, on no device, built from the configuration.

Layers of one kind are alike, so a model of any depth follows from one with a layer of each kind and from others with
one more layer of a kind.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
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

_FOUR_BIT, _SCALES = 0.5, 4 / 64  # bytes of a weight in 4 bits, and its share of its block's fp32 scale
_NESTED_SCALES = 1 / 64 + 4 / (64 * 256)  # scales in 8 bits, and their own


@dataclass(frozen=True)
class Blueprint:
    """The parts that a model is built from."""

    arguments: ModelArguments  # which model, how it is loaded, and its adapter
    config: Any  # its configuration
    reward: bool  # whether it is a reward model
    dtype: torch.dtype  # of its weights, where they are not in 4 bits
    checkpointed_share: float = 0.0  # share of the layers that compute their activations again; 0 without checkpointing
    path: ForwardPath = "auto"  # how batches are computed

    @classmethod
    def read(cls, arguments: ModelArguments, *, reward: bool = False, path: ForwardPath = "auto") -> Blueprint:
        """From a model's configuration, on disk or on the hub; no weights are read."""
        config = load_config(arguments)
        own = getattr(config.get_text_config(), "dtype", None) or torch.float32
        dtype = own if arguments.dtype == "auto" else getattr(torch, arguments.dtype or "float32")
        return cls(arguments, config, reward, dtype, path=path)

    def kinds(self) -> list[list[int]]:
        """The numbers of the layers of each kind, in the order of their first ones."""
        found: dict[Any, list[int]] = {}
        layers = _layers(self._on_meta())
        checkpointed = checkpointed_layers(len(layers), self.checkpointed_share)
        for number, (layer, again) in enumerate(zip(layers, checkpointed, strict=True)):
            shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
            windows = [getattr(module, "sliding_window", None) for module in layer.modules()]
            key = (type(layer), shapes, tuple(window for window in windows if isinstance(window, int)), again)
            found.setdefault(key, []).append(number)
        return list(found.values())

    def build(self, mode: FakeTensorMode, numbers: list[int]) -> StandIn:
        """The model with these layers alone, ready to be trained, its tensors fake."""
        model = self._on_meta()
        layers = _layers(model)
        again = checkpointed_layers(len(layers), self.checkpointed_share)
        for number in numbers:
            layers[number].gradient_checkpointing = again[number]
            layers[number]._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        _keep_layers(model, layers, numbers)
        if self.arguments.quantization:
            _to_four_bits(model, self.dtype)
        with torch.device("meta"):
            adapted = self._adapted(model)
        freeze_parts_unused_by_text(adapted)
        disable_dropout(adapted)
        with mode:
            adapted.to_empty(device="cpu")
            model.tie_weights()
        adapted.train()
        kept = [layer for layer in adapted.modules() if isinstance(layer, GradientCheckpointingLayer)]
        return StandIn(adapted, kept, self._settle(adapted), self.arguments)

    def _on_meta(self) -> Any:
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if hasattr(text, "num_local_experts") or hasattr(text, "num_experts"):
            text._experts_implementation = config._experts_implementation = "grouped_mm"  # shapes without numbers
        kind = AutoModelForSequenceClassification if self.reward else auto_class(config)
        if self.reward:
            config.num_labels = 1
        with torch.device("meta"), no_init_weights():
            return kind.from_config(config, dtype=self.dtype, trust_remote_code=self.arguments.trust_remote_code)

    def _adapted(self, model: Any) -> Any:
        adapter = find_adapter(self.arguments.model_name_or_path, self.arguments.model_revision)
        if adapter is not None:
            adapter.inference_mode = False
            return get_peft_model(model, adapter)
        return add_adapter(model, self.arguments.lora) if self.arguments.use_peft else model

    def _settle(self, model: Any) -> Path:
        """Take the path that batches will take, as far as that shows without numbers."""
        inner = prepare_policy(model)
        state = state_of(inner)
        state.fused_head = is_reward_model(inner) or find_head(inner) is not None
        state.path = "padded" if self.path == "padded" else "packed"
        kinds = getattr(causal_lm(inner).config.get_text_config(), "layer_types", None) or ()
        try:
            if state.path == "packed":
                install(inner)
            if self.path == "cached" or not set(kinds) <= ATTENTION_TYPES:
                state.path = "cached"
        except UnsupportedAttentionError:
            state.path = "cached"
        return state.path


@dataclass(frozen=True)
class StandIn:
    """A model whose tensors are fake."""

    model: Any  # with its adapter, if it has one
    layers: list[nn.Module]  # its layers
    path: Path  # the path that it takes
    arguments: ModelArguments  # how the real one is loaded

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that are trained."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @property
    def weights(self) -> float:
        """Bytes of all weights and buffers."""
        each = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        small = {id(module.weight) for module in self.model.modules() if isinstance(module, _FourBitLinear)}
        nested = self.arguments.quantization.get("use_bnb_nested_quant")
        four_bit = _FOUR_BIT + (_NESTED_SCALES if nested else _SCALES)
        return sum(t.numel() * four_bit if name in small else float(t.nbytes) for name, t in each.items())

    @property
    def largest_layer(self) -> int:
        """Bytes of the weights of the largest layer."""
        return max(sum(weight.nbytes for weight in layer.parameters()) for layer in self.layers)

    @property
    def outside_layers(self) -> int:
        """Bytes of the weights that no layer has: embeddings, output layer, last norm."""
        inside = {id(weight) for layer in self.layers for weight in layer.parameters()}
        return sum(weight.nbytes for weight in self.model.parameters() if id(weight) not in inside)


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


def _keep_layers(model: Any, layers: nn.ModuleList, numbers: list[int]) -> None:
    """Leave these layers only, in ``model`` and in its configuration."""
    total = len(layers)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if child is layers:
                setattr(module, name, nn.ModuleList([layers[number] for number in numbers]))
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:  # one entry per layer
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)


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
