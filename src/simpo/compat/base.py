"""Base classes of the drop-in trainers and configurations: shared keys, constructor arguments, model loading."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import Any, ClassVar

import torch
from datasets import Dataset, Value
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, SchedulerType, TrainingArguments, set_seed

from simpo.config import setting
from simpo.data.messages import is_transcript
from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.objectives import Responses, sft_term
from simpo.training.batches import PlannedBatch
from simpo.training.preference import PreferenceConfig, PreferenceTrainer

logger = logging.getLogger(__name__)

# model_init_kwargs: our names for the supported keys, and harmless values of keys that are otherwise rejected (training
# uses no KV cache, and Trainer places the model).
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
# Ranges used for the paper's models, and the learning rate at which models have been seen to collapse into repetition.
_PAPER_BETAS, _PAPER_RATIOS, _COLLAPSE_RATE = (2.0, 10.0), (0.1, 0.8), 1e-5
_UNLIMITED = 2**20  # tokens; stands in for TRL's max_length=None


def unsupported(default: Any, remedy: str) -> Any:
    """Declare a field that must be unset or falsy; any other value raises an error that names the remedy."""
    return setting(default, "Not supported.", unsupported=remedy)


def without_effect(default: Any, why: str) -> Any:
    """Declare a field that is accepted but ignored: a non-default value logs a warning that says why."""
    return setting(default, "Has no effect here.", without_effect=why)


@dataclass
class PortedKeys:
    """Keys and defaults shared by all drop-in configurations; a mixin for simpo's own configuration classes."""

    num_train_epochs: float = setting(3.0, "Passes over the data.", above=0)
    lr_scheduler_type: SchedulerType | str = setting("linear", "Learning-rate schedule.")
    warmup_steps: float = setting(0, "Warm-up steps; a value below 1 is a fraction of all steps.")
    model_init_kwargs: dict[str, Any] | str | None = setting(None, "Options for loading a model given by name.")
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value and "unsupported" in field.metadata:
                raise SimpoError(f"{field.name}: not supported ({field.metadata['unsupported']})")
            if value != field.default and "without_effect" in field.metadata:
                logger.warning("%s has no effect: %s", field.name, field.metadata["without_effect"])
        super().__post_init__()  # type: ignore[misc]

    def model_arguments(self, name: str) -> ModelArguments:
        """Return the arguments for loading model ``name``: in fp32 unless ``model_init_kwargs`` sets a dtype."""
        arguments: dict[str, Any] = {"trust_remote_code": getattr(self, "trust_remote_code", False)}
        kwargs: Any = self.model_init_kwargs or {}
        for key, value in kwargs.items():
            if key in _MODEL_KEYS:
                arguments[_MODEL_KEYS[key]] = value
            elif value not in _MODEL_KEYS_WITHOUT_EFFECT.get(key, ()):
                raise SimpoError(f"model_init_kwargs: {key!r} is not supported; load the model yourself and pass it")
        if arguments.get("dtype") is not None:
            arguments["dtype"] = str(arguments["dtype"]).removeprefix("torch.")
        return ModelArguments(name, **{key: value for key, value in arguments.items() if value is not None})


@dataclass
class TRLKeys(PortedKeys):
    """Keys shared by TRL's configurations, with the defaults of TRL 1.16."""

    learning_rate: float = setting(1e-6, "Peak learning rate.")
    bf16: bool | None = setting(None, "Compute in bf16 (default: true unless fp16 is set).")
    gradient_checkpointing: bool | None = setting(None, "Recompute activations in the backward pass (default: true).")
    max_length: int | None = setting(1024, "Maximum row length in tokens; None for no limit.")
    trust_remote_code: bool = setting(False, "Run code shipped with the model.")
    activation_offloading: bool = unsupported(False, "gradient_checkpointing saves more memory; leave it out")
    pad_to_multiple_of: int | str | None = without_effect("auto", "nothing is padded")
    padding_free: bool = without_effect(False, "nothing is padded")
    pad_token: str | None = without_effect(None, "nothing is padded")
    router_aux_loss_coef: float | None = setting(None, "Not supported.")

    def __post_init__(self) -> None:
        if self.router_aux_loss_coef is not None:
            raise SimpoError("router_aux_loss_coef: not supported (set it in the model's configuration)")
        if self.max_length is None:
            self.max_length = _UNLIMITED
        if self.bf16 is None:
            self.bf16 = not self.fp16  # type: ignore[attr-defined]
        # TRL checkpoints activations by default, and a model that fits into memory there should also fit here.
        # transformers 5.23 renamed the key.
        new_name = "activation_checkpointing"
        if self.gradient_checkpointing is None and getattr(self, new_name, None) is None:
            setattr(self, new_name if hasattr(self, new_name) else "gradient_checkpointing", True)
        super().__post_init__()


@dataclass
class PortedConfig(PortedKeys, PreferenceConfig):  # type: ignore[misc, valid-type]
    """Keys and defaults shared by the CPO, ORPO and paper configurations."""

    max_completion_length: int | None = without_effect(None, "it limits encoder-decoder models only")
    label_pad_token_id: int = without_effect(-100, "no label tensors are built")
    padding_value: int | None = without_effect(None, "padding is never scored")
    generate_during_eval: bool = unsupported(False, "set it to False and sample from a checkpoint afterwards")
    is_encoder_decoder: bool | None = unsupported(None, "only causal language models can be trained; leave it out")

    def __post_init__(self) -> None:
        accumulated = self.gradient_accumulation_steps > 1  # read before super() folds it into the batch size
        super().__post_init__()
        if self.objective == "simpo":
            beta, ratio = self.hyperparameters["beta"], self.hyperparameters["gamma_beta_ratio"]
            if not _PAPER_BETAS[0] <= beta <= _PAPER_BETAS[1]:
                logger.warning("beta %g is outside the range used in the paper, %g to %g", beta, *_PAPER_BETAS)
            if not _PAPER_RATIOS[0] <= ratio <= _PAPER_RATIOS[1]:
                logger.warning("gamma is %g times beta; the paper uses %g to %g times beta", ratio, *_PAPER_RATIOS)
        if self.sft_weight:
            logger.warning("an SFT term of weight %g is added; pure SimPO has none (weight 0)", self.sft_weight)
            if accumulated or self.world_size > 1:
                logger.warning(
                    "the SFT term is averaged over the chosen tokens of the whole optimizer step; the original "
                    "averages over each device batch"
                )
        if self.learning_rate >= _COLLAPSE_RATE:
            logger.warning(
                "learning_rate %g: models are known to collapse at %g and above", self.learning_rate, _COLLAPSE_RATE
            )


# ---- The trainers' constructor.

_UNSUPPORTED_ARGUMENTS = {
    "data_collator": "batches are packed, not padded, so there is nothing to collate",
    "model_init": "hyperparameter search is not supported; pass model",
    "preprocess_logits_for_metrics": "logits are never materialized",
    "compute_metrics": "logits are never materialized; the trainer's score_rows returns per-row metrics",
    "compute_loss_func": "the loss is computed without logits; leave it out",
    "optimizer_cls_and_kwargs": "set optim in the configuration, or pass optimizers",
    "quantization_config": "load the model with it, call peft's prepare_model_for_kbit_training and get_peft_model, "
    "and pass the result",
}
_KIND = Parameter.POSITIONAL_OR_KEYWORD


class PortedTrainer:
    """Constructor shared by all drop-in trainers; a mixin for simpo's own trainers.

    Class attributes:
        config_class: class of ``args``; ``args=None`` uses its defaults.
        arguments: names of the constructor's arguments, in the original's order.
        text_column: if this column holds plain strings, rows are read without the chat template, as in TRL.
    """

    config_class: ClassVar[type[PortedKeys]]
    arguments: ClassVar[tuple[str, ...]]
    text_column: ClassVar[str] = "chosen"
    _signature: ClassVar[Signature]  # of the constructor, without ``self``

    def __init_subclass__(cls) -> None:
        if "arguments" in vars(cls):
            cls._signature = Signature([Parameter(name, _KIND, default=None) for name in cls.arguments])
            cls.__init__ = _with_signature(cls.__init__, cls._signature)  # type: ignore[method-assign]

    def __init__(self, *positional: Any, **named: Any) -> None:
        """Accept the original's arguments, by position or by name; passing None is the same as leaving one out.

        Args:
            model: a model, or a hub name or folder to load with ``args.model_init_kwargs``.
            ref_model: must have the same weights as ``model``, because the reference is always the initial model.
            args: an instance of ``config_class`` (default: one with default values).
            train_dataset: training rows; the chat template is not applied to plain strings.
            eval_dataset: held-out rows, or a dict of named datasets.
            processing_class: the tokenizer (default: the one saved with the model).
            tokenizer: the older name for ``processing_class``.
            callbacks: as for ``Trainer``.
            optimizers: as for ``Trainer``.
            peft_config: an adapter to add to the model and train.
            formatting_func: maps a row to the text to train on.
            data_collator, model_init, compute_metrics, compute_loss_func, optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics, quantization_config: not supported.

        Raises:
            SimpoError: an argument is unsupported or invalid; the message names it.
            TypeError: the original has no such argument.
        """
        given = dict.fromkeys(self.arguments) | self._signature.bind(*positional, **named).arguments
        for name, why in _UNSUPPORTED_ARGUMENTS.items():
            if given.get(name) is not None:
                raise SimpoError(f"{name}: not supported ({why})")
        if given["processing_class"] is not None and given.get("tokenizer") is not None:
            raise SimpoError("tokenizer: the older name for processing_class; pass only one of them")
        config: Any = self.config_class() if given["args"] is None else given["args"]
        if not isinstance(config, self.config_class):
            kind = f"{type(config).__module__}.{type(config).__qualname__}"
            raise SimpoError(f"args: got a {kind}; import {self.config_class.__name__} from simpo.compat")
        self.adapt(config, given)
        set_seed(config.seed)  # type: ignore[attr-defined] # before a new adapter is initialized
        policy = self._load_policy(given["model"], config, given["peft_config"], given.get("ref_model"))
        tokenizer = given["processing_class"] or given.get("tokenizer")
        if tokenizer is None:
            name = policy.config.name_or_path
            if not name:
                raise SimpoError("processing_class: cannot be derived, because the model has no name; pass a tokenizer")
            tokenizer = load_tokenizer(config.model_arguments(name))
        super().__init__(  # type: ignore[call-arg]
            *(policy, config, given["train_dataset"], given["eval_dataset"], tokenizer, given["callbacks"]),
            given["optimizers"] or (None, None),
        )

    def adapt(self, config: Any, given: dict[str, Any]) -> None:
        """Hook: update the configuration or arguments where the original derives one from the other."""

    def _load_policy(self, model: Any, config: Any, peft_config: Any, ref_model: nn.Module | None) -> Any:
        """Return the model to train, wrapped in an adapter if ``peft_config`` is given."""
        if model is None:
            raise SimpoError("model: missing; pass a model, a hub name or a folder")
        if isinstance(model, str):
            model = self.load(config.model_arguments(model))  # type: ignore[attr-defined]
        elif config.model_init_kwargs:
            raise SimpoError("model_init_kwargs: the model is already loaded; pass its name instead, or leave them out")
        if model.config.is_encoder_decoder:
            raise SimpoError("model: is an encoder-decoder; only causal language models can be trained")
        if ref_model is not None and not _same_weights(ref_model, model):
            raise SimpoError(
                "ref_model: has other weights than model, but the reference is always the initial model; leave "
                "ref_model out, or pass it as model"
            )
        if peft_config is None:
            return model
        if not isinstance(peft_config, PeftConfig):
            kind = type(peft_config).__name__
            raise SimpoError(f"peft_config: got a {kind}; pass a peft configuration such as LoraConfig")
        if isinstance(model, PeftModel):
            raise SimpoError("peft_config: the model already has an adapter; leave peft_config out, or merge it first")
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            raise SimpoError(
                "peft_config: not supported for quantized models; call peft's prepare_model_for_kbit_training and "
                "get_peft_model, and pass the result"
            )
        return get_peft_model(model, peft_config)

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize as simpo's trainer does, but without the chat template for rows of plain strings."""
        tokenizer = tokenizer_for(dataset, tokenizer, cls.text_column)
        return super().prepare(add_prompts(dataset), tokenizer, args, label)  # type: ignore[misc]


def _with_signature(constructor: Callable[..., None], signature: Signature) -> Callable[..., None]:
    """Wrap ``constructor`` so that ``help`` and :mod:`inspect` show ``signature``; scripts inspect it, too."""

    @functools.wraps(constructor)
    def __init__(self: Any, *positional: Any, **named: Any) -> None:  # noqa: N807 - becomes the class's __init__
        constructor(self, *positional, **named)

    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[Parameter("self", _KIND), *signature.parameters.values()]
    )
    return __init__


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.equal(first[name].to(second[name]), second[name])
        for name in first
    )


def tokenizer_for(dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, column: str) -> Any:
    """Return ``tokenizer`` for these rows: without its chat template if ``column`` is plain text, as in TRL."""
    columns = getattr(dataset, "features", None) or {}
    if tokenizer is None or not tokenizer.chat_template or not isinstance(columns.get(column), Value):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def add_prompts(dataset: Dataset, *, whole_words: bool = False) -> Dataset:
    """Add a prompt to pairs of plain texts without one: their common prefix, as in TRL.

    With ``whole_words``, the prompt ends before the last space of that prefix. Each text then keeps the tokens it has
    when tokenized whole, and a text that is a prefix of the other is not left empty. Transcripts are unchanged: they
    are split into turns when they are read.
    """
    columns = getattr(dataset, "features", None) or {}
    if "prompt" in columns or not all(isinstance(columns.get(name), Value) for name in ("chosen", "rejected")):
        return dataset
    return dataset.map(_add_prompt, fn_kwargs={"whole_words": whole_words})


def _add_prompt(row: dict[str, Any], *, whole_words: bool) -> dict[str, Any]:
    texts = row["chosen"], row["rejected"]
    if not all(isinstance(text, str) for text in texts) or any(map(is_transcript, texts)):
        return {"prompt": None}
    shared = os.path.commonprefix(texts)  # noqa: RUF071 - texts, not paths
    prompt = shared[: max(shared.rfind(" "), 0)] if whole_words else shared.removesuffix(" ")
    return {"prompt": prompt, "chosen": texts[0][len(prompt) :], "rejected": texts[1][len(prompt) :]}


class PortedPreferenceTrainer(PortedTrainer, PreferenceTrainer):
    """Base class of TRL's preference trainers and the paper's ``SimPOTrainer``.

    The SFT term (ORPO's included) is averaged over all tokens of a step's chosen responses, so longer responses count
    more.
    """

    _mean_chosen_length = torch.tensor(math.nan)  # in the current step

    @property
    def _sft_weight(self) -> float:
        return 1.0 if self.objective.name == "orpo" else self.args.sft_weight

    def before_step(self, model: nn.Module, batches: Sequence[PlannedBatch]) -> None:
        """Compute the mean chosen length that the micro-batches need, then do what the base class does."""
        self._update_mean_length(batches)
        super().before_step(model, batches)

    def before_evaluation(self, batches: Sequence[PlannedBatch]) -> None:
        """Compute the mean chosen length that the micro-batches need."""
        self._update_mean_length(batches)

    def loss_and_metrics(
        self, y: Responses, batch: PlannedBatch, pair_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Extend the base class: weight a pair's SFT term by its chosen response's share of the step's tokens."""
        losses, metrics = super().loss_and_metrics(y, batch, pair_weights)
        if self._sft_weight:
            w = Responses(y.logp[batch.pairs.best], y.length[batch.pairs.best])
            share = w.length / self._mean_chosen_length  # 1 on average
            losses = losses + self._sft_weight * sft_term(w) * (share - 1)  # the base class added it with weight 1
            metrics[:, 0] = losses.detach()
        return losses, metrics

    def _update_mean_length(self, batches: Sequence[PlannedBatch]) -> None:
        """Compute the mean length of the chosen responses in the batches, across ranks."""
        if not self._sft_weight:
            return
        tokens = sum((batch.packed.lengths[batch.pairs.best] * batch.packed.weights).sum() for batch in batches)
        pairs = sum(batch.packed.weights.sum() for batch in batches)
        totals = self._sum_over_ranks(torch.stack([tokens, pairs]).to(self.args.device, torch.float32))
        self._mean_chosen_length = totals[0] / totals[1]
