"""Base models in 4 bits, for adapters to be trained on (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel

from simpo.errors import SimpoError


def four_bits(*, kind: Literal["nf4", "fp4"], nested: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Options of ``from_pretrained`` that load a model in 4 bits a weight onto this process's GPU.

    Args:
        kind: of 4-bit numbers.
        nested: whether their scales are quantized too.
        dtype: that weights are expanded to for a product.

    Raises:
        SimpoError: bitsandbytes or a GPU is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SimpoError("load_in_4bit: bitsandbytes is not installed; pip install 'simpo[qlora]'")
    if not torch.cuda.is_available():
        raise SimpoError("load_in_4bit: there is no GPU here; leave it out to train the adapter on whole weights")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
    )
    return {"quantization_config": config, "device_map": {"": PartialState().local_process_index}}


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A quantized model ready for an adapter, with what is not quantized (norms, embeddings, output layer) in fp32."""
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
