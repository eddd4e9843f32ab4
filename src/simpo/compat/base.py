"""The base of all trainers under other names: it checks their arguments and loads the model that they name."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from datasets import Dataset, Value
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from simpo.compat.keys import PortedKeys
from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError
from simpo.models.loading import load_tokenizer

_UNSUPPORTED_ARGUMENTS = {
    "data_collator": "batches are packed, not padded, so there is nothing to collate",
    "model_init": "hyperparameter search is not supported; pass model",
    "preprocess_logits_for_metrics": "no logits are made",
    "compute_metrics": "no logits are made; the trainer's score_rows returns the metrics of every row",
    "compute_loss_func": "the loss is computed without logits; leave it out",
    "optimizer_cls_and_kwargs": "write optim in the configuration, or pass optimizers",
    "quantization_config": "load the model with it, call peft's prepare_model_for_kbit_training and get_peft_model, "
    "and pass the result",
}


class PortedTrainer:
    """The constructor of all trainers under other names; to be combined with one of simpo's trainers.

    Class attributes:
        config_class: the class of ``args``; its defaults are used for None.
        text_column: where this column is text, TRL reads the rows as they are, without the chat template.
    """

    config_class: ClassVar[type[PortedKeys]]
    text_column: ClassVar[str] = "chosen"

    @classmethod
    def check_config(cls, args: Any) -> Any:
        """The configuration; raises :class:`SimpoError` if it is of another class."""
        config: Any = cls.config_class() if args is None else args
        if not isinstance(config, cls.config_class):
            kind = f"{type(config).__module__}.{type(config).__qualname__}"
            raise SimpoError(f"args: a {kind}; import {cls.config_class.__name__} from simpo.compat")
        return config

    def _initialize(
        self,
        model: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        callbacks: Any,
        optimizers: tuple[Any, Any],
        peft_config: Any,
        ref_model: nn.Module | None = None,
        **unsupported: Any,
    ) -> None:
        """Check the arguments, which the constructors explain, load what they name, and initialize the trainer."""
        for name, value in unsupported.items():
            if value is not None:
                raise SimpoError(f"{name}: not supported ({_UNSUPPORTED_ARGUMENTS[name]})")
        config = self.check_config(args)
        set_seed(config.seed)  # before the weights of a new adapter are drawn
        policy = self._policy(model, config, peft_config, ref_model)
        if processing_class is None:
            name = policy.config.name_or_path
            if not name:
                raise SimpoError("processing_class: the model has no name to find its tokenizer by; pass the tokenizer")
            processing_class = load_tokenizer(name, config.model_arguments(name))
        super().__init__(policy, config, train_dataset, eval_dataset, processing_class, callbacks, optimizers)  # type: ignore[call-arg]

    def _policy(self, model: Any, config: Any, peft_config: Any, ref_model: nn.Module | None) -> Any:
        """The model to train, with the adapter if there is one."""
        if model is None:
            raise SimpoError("model: pass a model, or the name or folder of one")
        if isinstance(model, str):
            model = self.load(model, config.model_arguments(model))  # type: ignore[attr-defined]
        elif config.model_init_kwargs:
            raise SimpoError("model_init_kwargs: the model is loaded already; pass its name, or leave them out")
        if model.config.is_encoder_decoder:
            raise SimpoError("model: an encoder-decoder; only causal language models are trained")
        if ref_model is not None and not _same_weights(ref_model, model):
            raise SimpoError(
                "ref_model: not the weights that training starts from, which are always the reference; leave it out, "
                "or start from that model"
            )
        if peft_config is None:
            return model
        if not isinstance(peft_config, PeftConfig):
            kind = type(peft_config).__name__
            raise SimpoError(f"peft_config: a {kind} instead of one of peft's, such as LoraConfig")
        if isinstance(model, PeftModel):
            raise SimpoError("peft_config: the model already has an adapter; leave peft_config out, or merge it first")
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            raise SimpoError(
                "peft_config: not for quantized models; call peft's prepare_model_for_kbit_training and get_peft_model "
                "and pass their result"
            )
        return get_peft_model(model, peft_config)

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize as simpo's trainer does; rows of plain strings without the chat template."""
        tokenizer = for_rows(dataset, tokenizer, cls.text_column)
        return super().prepare(dataset, tokenizer, args, label)  # type: ignore[misc]


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.equal(first[name].to(second[name]), second[name])
        for name in first
    )


def for_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, column: str) -> Any:
    """The tokenizer for these rows: without a chat template where ``column`` is text, which TRL reads as it is."""
    columns = getattr(dataset, "features", None) or {}
    if tokenizer is None or not tokenizer.chat_template or not isinstance(columns.get(column), Value):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer
