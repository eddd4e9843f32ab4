"""Base models in 4 bits, for adapters to be trained on (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from simpo.errors import SimpoError


def four_bits(*, kind: Literal["nf4", "fp4"], nested: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Options of ``from_pretrained`` that load a model in 4 bits a weight onto this process's GPU, or the CPU.

    Args:
        kind: of 4-bit numbers.
        nested: whether their scales are quantized too.
        dtype: that weights are expanded to for a product.

    Raises:
        SimpoError: bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SimpoError("load_in_4bit: bitsandbytes is not installed; pip install 'simpo[qlora]'")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
    )
    place = PartialState().local_process_index if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": place}}


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from repacking their weights for inference.

    On CPUs with AVX512-BF16, bitsandbytes does so at a layer's first forward in evaluation mode, for good: from then on
    products are rounded to bf16, and gradients do not pass through them, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A quantized model ready for an adapter, with what is not quantized (norms, embeddings, output layer) in fp32."""
    keep_gradients(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
