"""What the trainers under other names accept: their arguments, checked, and the model that they name, loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Value
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from simpo.compat.keys import PortedKeys
from simpo.errors import SimpoError
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments

_UNSUPPORTED_ARGUMENTS = {
    "data_collator": "batches are packed, not padded, so there is nothing to collate",
    "model_init": "hyperparameter search is not supported; give model",
    "preprocess_logits_for_metrics": "no logits are made",
    "compute_metrics": "no logits are made; the trainer's score_rows returns the metrics of every row",
    "compute_loss_func": "the loss is computed without logits; leave it out",
    "optimizer_cls_and_kwargs": "write optim in the configuration, or give optimizers",
    "quantization_config": "load the model with it, call peft's prepare_model_for_kbit_training and get_peft_model, "
    "and give the result",
}


class Start(NamedTuple):
    """What a trainer starts with."""

    model: Any
    config: Any
    tokenizer: PreTrainedTokenizerBase


def start(
    config_class: type[PortedKeys],
    load: Callable[[str, ModelArguments], Any],
    *,
    model: Any,
    args: Any,
    processing_class: Any,
    peft_config: Any = None,
    ref_model: nn.Module | None = None,
    unsupported: Mapping[str, Any],
) -> Start:
    """Check the arguments of a trainer, and load what they name.

    Args:
        config_class: what ``args`` has to be; its defaults are used for None.
        load: loads a model by name.
        model: a model, or the name or folder of one, then loaded with ``args.model_init_kwargs``.
        args: the configuration.
        processing_class: the tokenizer; by default the one saved with the model.
        peft_config: an adapter to add to the model and train.
        ref_model: a reference model, which has to have the weights that training starts from.
        unsupported: arguments that have to be None, by name.

    Raises:
        SimpoError: an argument that is not supported; the message names it.
    """
    for name, value in unsupported.items():
        if value is not None:
            raise SimpoError(f"{name}: not supported ({_UNSUPPORTED_ARGUMENTS[name]})")
    config: Any = config_class() if args is None else args
    if not issubclass(type(config), config_class):  # isinstance would narrow its type
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise SimpoError(f"args: a {kind}; import {config_class.__name__} from simpo.compat")
    set_seed(config.seed)  # before the weights of a new adapter are drawn
    policy = _load(model, config, peft_config, load, ref_model)
    if processing_class is None:
        name = policy.config.name_or_path
        if not name:
            raise SimpoError("processing_class: the model has no name to find its tokenizer by; give the tokenizer")
        processing_class = load_tokenizer(name, config.model_arguments(name))
    return Start(policy, config, processing_class)


def _load(
    model: Any, config: PortedKeys, peft_config: Any, load: Callable[..., Any], ref_model: nn.Module | None
) -> Any:
    if model is None:
        raise SimpoError("model: give a model, or the name or folder of one")
    if isinstance(model, str):
        model = load(model, config.model_arguments(model))
    elif config.model_init_kwargs:
        raise SimpoError("model_init_kwargs: the model is loaded already; give its name, or leave them out")
    if model.config.is_encoder_decoder:
        raise SimpoError("model: an encoder-decoder; only causal language models are trained")
    if ref_model is not None and not _same_weights(ref_model, model):
        raise SimpoError(
            "ref_model: not the weights that training starts from, which are always the reference; leave it out, or "
            "start from that model"
        )
    if peft_config is None:
        return model
    if not isinstance(peft_config, PeftConfig):
        raise SimpoError(f"peft_config: a {type(peft_config).__name__} instead of one of peft's, such as LoraConfig")
    if isinstance(model, PeftModel):
        raise SimpoError("peft_config: the model has an adapter already; give that model alone, or merge it first")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise SimpoError(
            "peft_config: not for quantized models; call peft's prepare_model_for_kbit_training and get_peft_model "
            "and give their result"
        )
    return get_peft_model(model, peft_config)


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].shape == theirs[name].shape and torch.equal(mine[name].to(theirs[name]), theirs[name])
        for name in mine
    )


def for_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, column: str) -> Any:
    """The tokenizer for these rows: without chat template where ``column`` is text, which TRL reads as it is."""
    columns = getattr(dataset, "features", None) or {}
    if tokenizer is None or not tokenizer.chat_template or not isinstance(columns.get(column), Value):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer
