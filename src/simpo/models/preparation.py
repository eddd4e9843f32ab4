"""Changes to a loaded model before it is trained: dropout, parts without gradients, 4-bit layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from simpo.packing.model import causal_lm, score_head

logger = logging.getLogger(__name__)


def disable_dropout(model: nn.Module) -> None:
    """Set every probability of dropout in ``model`` to 0, and the noise that some routers add to their inputs.

    Layers without an ``nn.Dropout`` read the probability from an attribute, under many names (``residual_dropout``,
    ``attn_dropout``, ``router_jitter_noise``, ...), or from the configuration.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if config is not None and isinstance(getattr(config, "hidden_dropout", None), float):  # Falcon reads it there
            config.hidden_dropout = 0.0


def parts_unused_by_text(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """The largest parts of ``model``, by name, that take no part in a forward pass of text alone.

    These are the parts of a multimodal model outside its language model and its output or score layer (vision and audio
    towers), and a language model's own layers of cross-attention to images. A model of text alone has none.
    """
    inner: Any = causal_lm(model)
    config = inner.config
    text = config.get_text_config()
    crossing = getattr(text, "cross_attention_layers", None) or []
    found: dict[str, nn.Module | nn.Parameter] = {
        name: module
        for number in crossing
        for name, module in inner.named_modules()
        if name.endswith(f"layers.{number}") and "CrossAttention" in type(module).__name__
    }
    if text is config:
        return found
    reached = (inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings(), score_head(inner))
    kept = {id(module) for one in reached if one is not None for module in one.modules()}
    return found | dict(_outside(inner, kept, ""))


def _outside(module: nn.Module, kept: set[int], prefix: str) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, child in module.named_children():
        inside = {id(one) for one in child.modules()}
        if id(child) in kept:
            continue
        if inside & kept:
            yield from _outside(child, kept, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}", child


def freeze_parts_unused_by_text(model: nn.Module) -> None:
    """Freeze the parts that text does not use, and report them.

    Such weights get no gradient: DDP would wait for one, and weight decay would shrink them.
    """
    names, count = [], 0
    for name, part in parts_unused_by_text(model).items():
        parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        if trained:
            names.append(name)
            count += sum(parameter.numel() for parameter in trained)
    if names:
        logger.warning("not trained, because text does not use it: %s (%s parameters)", ", ".join(names), f"{count:,}")


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from repacking their weights for inference.

    On CPUs with AVX512-BF16, bitsandbytes does so at a layer's first forward pass in evaluation mode, permanently:
    from then on products are rounded to bf16, and gradients do not pass through them, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
