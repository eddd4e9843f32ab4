"""Keys and defaults of the configurations under the names of TRL and of the paper's code."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from transformers import SchedulerType, TrainingArguments

from simpo.config import setting
from simpo.errors import SimpoError
from simpo.models.settings import ModelArguments
from simpo.training.preference import PreferenceConfig

logger = logging.getLogger(__name__)

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
_UNLIMITED = 2**20  # tokens, where TRL's max_length is None


def unsupported(default: Any, remedy: str) -> Any:
    """A field that must be left out or switched off; otherwise the error names the remedy."""
    return setting(default, "Not supported.", unsupported=remedy)


def without_effect(default: Any, why: str) -> Any:
    """A field whose values other than the default cause a warning with the reason why they have no effect."""
    return setting(default, "Has no effect here.", without_effect=why)


@dataclass
class PortedKeys:
    """The keys and defaults that all of these configurations share; to be combined with one of simpo's own."""

    num_train_epochs: float = setting(3.0, "Passes over the data.", above=0)
    lr_scheduler_type: SchedulerType | str = setting("linear", "Learning-rate schedule.")
    warmup_steps: float = setting(0, "Warm-up steps, or below 1 their share of all steps.")
    model_init_kwargs: dict[str, Any] | str | None = setting(None, "How a model that is given by name is loaded.")
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
        """The arguments for loading the model of that name: in fp32 unless ``model_init_kwargs`` has a dtype."""
        found: dict[str, Any] = {"trust_remote_code": getattr(self, "trust_remote_code", False)}
        kwargs: Any = self.model_init_kwargs or {}
        for key, value in kwargs.items():
            if key in _MODEL_KEYS:
                found[_MODEL_KEYS[key]] = value
            elif value not in _MODEL_KEYS_WITHOUT_EFFECT.get(key, ()):
                raise SimpoError(f"model_init_kwargs: {key!r} is not supported; load the model yourself and pass it")
        if found.get("dtype") is not None:
            found["dtype"] = str(found["dtype"]).removeprefix("torch.")
        return ModelArguments(name, **{key: value for key, value in found.items() if value is not None})


@dataclass
class TRLKeys(PortedKeys):
    """The keys that TRL's configurations share, with the defaults of TRL 1.16."""

    learning_rate: float = setting(1e-6, "Peak learning rate.")
    bf16: bool | None = setting(None, "Compute in bf16; True unless fp16 is set.")
    gradient_checkpointing: bool | None = setting(None, "Recompute activations in backward; True unless set.")
    max_length: int | None = setting(1024, "Longest row in tokens; None is no limit.")
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")
    activation_offloading: bool = unsupported(False, "gradient_checkpointing saves more memory; leave it out")
    pad_to_multiple_of: int | str | None = without_effect("auto", "nothing is padded")
    padding_free: bool = without_effect(False, "nothing is padded")
    pad_token: str | None = without_effect(None, "nothing is padded")
    router_aux_loss_coef: float | None = setting(None, "Not supported.")

    def __post_init__(self) -> None:
        if self.router_aux_loss_coef is not None:
            raise SimpoError("router_aux_loss_coef: not supported (set it in the configuration of the model)")
        if self.max_length is None:
            self.max_length = _UNLIMITED
        if self.bf16 is None:
            self.bf16 = not self.fp16  # type: ignore[attr-defined]
        # TRL checkpoints activations by default, and a model that fits into memory there should also fit here. The key
        # has another name since transformers 5.23.
        newer = "activation_checkpointing"
        if self.gradient_checkpointing is None and getattr(self, newer, None) is None:
            setattr(self, newer if hasattr(self, newer) else "gradient_checkpointing", True)
        super().__post_init__()


@dataclass
class PortedConfig(PortedKeys, PreferenceConfig):  # type: ignore[misc, valid-type]
    """The keys and defaults that CPO, ORPO and the paper's configuration share."""

    max_completion_length: int | None = without_effect(None, "it limits encoder-decoder models only")
    label_pad_token_id: int = without_effect(-100, "no labels are made")
    padding_value: int | None = without_effect(None, "padding is never scored")
    generate_during_eval: bool = unsupported(False, "sample from a checkpoint afterwards; set it to False")
    is_encoder_decoder: bool | None = unsupported(None, "only causal language models are trained; leave it out")

    def __post_init__(self) -> None:
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
