"""Models as TRL's and the paper's trainers take them: by name, or with an adapter to be put on."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simpo.compat.config import PortedConfig
from simpo.errors import SimpoError
from simpo.training.model_arguments import ModelArguments
from simpo.training.models import load_model, load_tokenizer

# model_init_kwargs -> ours
_KEYS = {
    "revision": "model_revision",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "trust_remote_code": "trust_remote_code",
}
# Training uses no cache, and Trainer places the model.
_MEANINGLESS = {"use_cache": (True, False, None), "device_map": ("auto", None), "quantization_config": (None,)}


def model_for(model: PreTrainedModel | str | None, config: PortedConfig, peft_config: Any = None) -> PreTrainedModel:
    """``model``, or the one of that name, with an adapter on it if there is a ``peft_config``.

    A model that is loaded has fp32 weights unless ``config.model_init_kwargs`` has a ``dtype``.

    Raises:
        SimpoError: there is no model, it cannot be loaded or trained, or an adapter cannot be put on it.
    """
    if model is None:
        raise SimpoError("model: give a model, or the name or folder of one")
    if isinstance(model, str):
        model = load_model(model, _arguments(model, config))
    elif config.model_init_kwargs:
        raise SimpoError("model_init_kwargs: the model is loaded already; give its name, or leave them out")
    _check(model)
    return model if peft_config is None else _with_adapter(model, peft_config)


def tokenizer_of(model: PreTrainedModel, config: PortedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with ``model``; raises :class:`SimpoError` if the model was never saved."""
    name = model.config.name_or_path
    if not name:
        raise SimpoError("processing_class: the model has no name to find its tokenizer by; give the tokenizer")
    return load_tokenizer(name, _arguments(name, config))


def _check(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder:
        raise SimpoError("model: an encoder-decoder; only causal language models are trained")
    if getattr(model.config, "output_router_logits", False) and getattr(model.config, "router_aux_loss_coef", 0.0):
        raise SimpoError(
            "output_router_logits: the loss that balances experts is not added; set model.config's to False"
        )


def _with_adapter(model: PreTrainedModel, peft_config: Any) -> PeftModel:
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


def _arguments(name: str, config: PortedConfig) -> ModelArguments:
    found: dict[str, Any] = {"trust_remote_code": getattr(config, "trust_remote_code", False)}
    given: Any = config.model_init_kwargs or {}
    for key, value in given.items():
        if key in _KEYS:
            found[_KEYS[key]] = value
        elif value not in _MEANINGLESS.get(key, ()):
            raise SimpoError(f"model_init_kwargs: {key!r} is not supported; load the model yourself and give it")
    if found.get("dtype") is not None:
        found["dtype"] = str(found["dtype"]).removeprefix("torch.")
    return ModelArguments(name, **{key: value for key, value in found.items() if value is not None})
