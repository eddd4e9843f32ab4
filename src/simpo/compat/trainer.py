"""Trainers and configurations under the names of TRL and of the paper's code."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset, Value
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError
from simpo.models.loading import load_model, load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.objectives import Responses, sft_term
from simpo.training.batches import PlannedBatch
from simpo.training.preference import PreferenceConfig, PreferenceTrainer

logger = logging.getLogger(__name__)

_UNSUPPORTED_KEYS = {
    "generate_during_eval": "sample from a checkpoint afterwards; set it to False",
    "is_encoder_decoder": "only causal language models are trained; leave it out",
}
# Key, its default, and why any other value has no effect.
_KEYS_WITHOUT_EFFECT = (
    ("max_completion_length", None, "it limits encoder-decoder models only"),
    ("max_target_length", None, "it limits encoder-decoder models only"),
    ("label_pad_token_id", -100, "no labels are made"),
    ("padding_value", None, "padding is never scored"),
)
_UNSUPPORTED_ARGUMENTS = {
    "data_collator": "batches are packed, not padded, so there is nothing to collate",
    "model_init": "hyperparameter search is not supported; give model",
    "preprocess_logits_for_metrics": "no logits are made",
    "compute_metrics": "no logits are made; the trainer's score_rows returns the metrics of every pair",
}
# Keys of model_init_kwargs and what they are called here, and those that have no effect with these values: training
# uses no cache, and Trainer places the model.
_MODEL_KEYS = {
    "revision": "model_revision",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "trust_remote_code": "trust_remote_code",
}
_MODEL_KEYS_WITHOUT_EFFECT = {
    "use_cache": (True, False, None),
    "device_map": ("auto", None),
    "quantization_config": (None,),
}
# The ranges of the paper's models, and the learning rate from which models were seen to repeat themselves.
_BETA, _RATIO, _COLLAPSE = (2.0, 10.0), (0.1, 0.8), 1e-5


@dataclass
class PortedConfig(PreferenceConfig):  # type: ignore[misc, valid-type]
    """The keys and defaults that both configurations share.

    Raises:
        SimpoError: a key that is not supported; the message names it.
    """

    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the pairs."})
    lr_scheduler_type: SchedulerType | str = field(default="linear", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Has no effect here."})
    label_pad_token_id: int = field(default=-100, metadata={"help": "Has no effect here."})
    padding_value: int | None = field(default=None, metadata={"help": "Has no effect here."})
    generate_during_eval: bool = field(default=False, metadata={"help": "Not supported."})
    is_encoder_decoder: bool | None = field(default=None, metadata={"help": "Not supported."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How a model that is given by name is loaded."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        for key, why in _UNSUPPORTED_KEYS.items():
            if getattr(self, key):
                raise SimpoError(f"{key}: not supported ({why})")
        for key, default, why in _KEYS_WITHOUT_EFFECT:
            if getattr(self, key, default) != default:
                logger.warning("%s has no effect: %s", key, why)
        accumulated = self.gradient_accumulation_steps > 1  # is folded into the batch size below
        super().__post_init__()
        if self.objective == "simpo":
            beta, ratio = self.hyperparameters["beta"], self.hyperparameters["gamma_beta_ratio"]
            if not _BETA[0] <= beta <= _BETA[1]:
                logger.warning("beta %g is outside the range of the paper's models, %g to %g", beta, *_BETA)
            if not _RATIO[0] <= ratio <= _RATIO[1]:
                logger.warning("gamma is %g times beta; the paper's gamma/beta is between %g and %g", ratio, *_RATIO)
        if self.sft_weight:
            logger.warning("an SFT term of weight %g is added; pure SimPO has none (weight 0)", self.sft_weight)
            if accumulated or self.world_size > 1:
                logger.warning(
                    "the SFT term is the mean over the chosen tokens of a whole optimizer step; the original takes "
                    "the mean of each device batch"
                )
        if self.learning_rate >= _COLLAPSE:
            logger.warning("learning_rate %g: models were seen to collapse from %g on", self.learning_rate, _COLLAPSE)


def _model_arguments(name: str, config: PortedConfig) -> ModelArguments:
    found: dict[str, Any] = {"trust_remote_code": getattr(config, "trust_remote_code", False)}
    given: Any = config.model_init_kwargs or {}
    for key, value in given.items():
        if key in _MODEL_KEYS:
            found[_MODEL_KEYS[key]] = value
        elif value not in _MODEL_KEYS_WITHOUT_EFFECT.get(key, ()):
            raise SimpoError(f"model_init_kwargs: {key!r} is not supported; load the model yourself and give it")
    if found.get("dtype") is not None:
        found["dtype"] = str(found["dtype"]).removeprefix("torch.")
    return ModelArguments(name, **{key: value for key, value in found.items() if value is not None})


def _load(model: Any, config: PortedConfig, peft_config: Any) -> Any:
    """``model``, or the one of that name (in fp32 unless ``model_init_kwargs`` has a dtype), with a new adapter."""
    if model is None:
        raise SimpoError("model: give a model, or the name or folder of one")
    if isinstance(model, str):
        model = load_model(model, _model_arguments(model, config))
    elif config.model_init_kwargs:
        raise SimpoError("model_init_kwargs: the model is loaded already; give its name, or leave them out")
    if model.config.is_encoder_decoder:
        raise SimpoError("model: an encoder-decoder; only causal language models are trained")
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


class PortedTrainer(PreferenceTrainer):
    """Takes what TRL's ``CPOTrainer`` and the paper's ``SimPOTrainer`` take, in their order.

    The SFT term is the mean over the chosen responses' tokens of a step, so that a long response counts more.

    Args:
        model: a model, or the name or folder of one, then loaded with ``args.model_init_kwargs``.
        args: a ``config_class``.
        data_collator: not supported.
        train_dataset: pairs. Strings are read as they are, conversations through the chat template.
        eval_dataset: pairs, or several data sets by name.
        processing_class: the tokenizer; by default the one saved with the model.
        model_init: not supported.
        callbacks: as for ``Trainer``.
        optimizers: as for ``Trainer``.
        preprocess_logits_for_metrics: not supported.
        peft_config: an adapter to add to the model and train.
        compute_metrics: not supported.
        tokenizer: the older name of ``processing_class``.

    Raises:
        SimpoError: an argument that is not supported, named, and what :class:`PreferenceTrainer` raises.
    """

    config_class: ClassVar[type[PortedConfig]]

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: PortedConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        unsupported = {
            "data_collator": data_collator,
            "model_init": model_init,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
            "compute_metrics": compute_metrics,
        }
        for name, value in unsupported.items():
            if value is not None:
                raise SimpoError(f"{name}: not supported ({_UNSUPPORTED_ARGUMENTS[name]})")
        if processing_class is not None and tokenizer is not None:
            raise SimpoError("tokenizer: the older name of processing_class; give one of them")
        config: Any = self.config_class() if args is None else args
        if not isinstance(config, self.config_class):
            kind = f"{type(config).__module__}.{type(config).__qualname__}"
            raise SimpoError(f"args: a {kind}; import {self.config_class.__name__} from simpo.compat")
        set_seed(config.seed)  # before the weights of a new adapter are drawn
        policy = _load(model, config, peft_config)
        processing_class = processing_class or tokenizer
        if processing_class is None:
            name = policy.config.name_or_path
            if not name:
                raise SimpoError("processing_class: the model has no name to find its tokenizer by; give the tokenizer")
            processing_class = load_tokenizer(name, _model_arguments(name, config))
        super().__init__(policy, config, train_dataset, eval_dataset, processing_class, callbacks, optimizers)
        self._mean_chosen_length = torch.tensor(math.nan)  # of the current step

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize pairs; those made of strings without the chat template."""
        columns = getattr(dataset, "features", None) or {}
        if tokenizer is not None and tokenizer.chat_template and isinstance(columns.get("chosen"), Value):
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = None
        return super().prepare(dataset, tokenizer, args, label)

    # ---- the SFT term as a mean over tokens ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The base's step, after computing the mean chosen length that its micro-batches need."""
        self._update_mean_length(inputs["micro_batches"])
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The base's step, after computing the mean chosen length that its micro-batches need."""
        self._update_mean_length(inputs["micro_batches"])
        return super().prediction_step(model, inputs, *args, **kwargs)

    def loss_and_metrics(self, y: Responses, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """The base's loss, with a pair's SFT term weighted by its chosen response's share of the step's tokens."""
        losses, metrics = super().loss_and_metrics(y, batch)
        if self.args.sft_weight:
            w = Responses(y.logp[batch.pairs.best], y.length[batch.pairs.best])
            share = w.length / self._mean_chosen_length  # 1 on average
            losses = losses + self.args.sft_weight * sft_term(w) * (share - 1)  # the base has added it with weight 1
            metrics[:, 0] = losses.detach()
        return losses, metrics

    def _update_mean_length(self, batches: list[PlannedBatch]) -> None:
        """Compute the mean length of the chosen responses in the batches of all ranks."""
        if not self.args.sft_weight:
            return
        tokens = sum((batch.packed.lengths[batch.pairs.best] * batch.packed.weights).sum() for batch in batches)
        pairs = sum(batch.packed.weights.sum() for batch in batches)
        totals = self._sum_over_ranks(torch.stack([tokens, pairs]).to(self.args.device, torch.float32))
        self._mean_chosen_length = totals[0] / totals[1]
