"""Models and tokenizers, from the hub or a folder."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from simpo.errors import SimpoError

logger = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model that training starts from."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "Type of the weights: float32 (default), bfloat16, float16, or auto for the files' own."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention outside packed batches (generation); packed ones choose theirs."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self) -> None:
        if self.model_name_or_path.startswith("~"):
            self.model_name_or_path = os.path.expanduser(self.model_name_or_path)  # noqa: PTH111 - no error for ~nobody
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise SimpoError(f"dtype: {self.dtype!r} is not one of {', '.join(_DTYPES)}")


def load_model(name: str, arguments: ModelArguments | None = None) -> PreTrainedModel:
    """A causal language model.

    Weights are fp32 unless ``dtype`` says otherwise: at the learning rates of preference optimization most of Adam's
    updates round to nothing in bf16 weights. ``bf16: true`` computes in bf16 from fp32 weights.

    Raises:
        SimpoError: there is no such model, or it cannot be loaded.
    """
    arguments = ModelArguments(name) if arguments is None else arguments
    dtype: Any = arguments.dtype or "float32"
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    options = {"attn_implementation": _attention(arguments.attn_implementation)}
    return _load(
        AutoModelForCausalLM, name, arguments, dtype=dtype, **{k: v for k, v in options.items() if v is not None}
    )


def load_tokenizer(
    name: str, arguments: ModelArguments | None = None, *, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with ``chat_template`` (a template, the path of a file with one, or ``"none"``).

    Raises:
        SimpoError: there is no such tokenizer, or no such template file.
    """
    arguments = ModelArguments(name) if arguments is None else arguments
    tokenizer = _load(AutoTokenizer, name, arguments)
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def read_chat_template(given: str) -> str | None:
    """The template that a recipe's ``chat_template`` means: its text, a file's text, or None for ``"none"``."""
    if given.strip().lower() == "none":
        return None
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise SimpoError(f"chat_template: {given[:80]!r} is neither a template nor a file of one ({error})") from error


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of ``model`` to 0, those that attention reads from its module included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        config = getattr(module, "config", None)
        if config is not None and isinstance(getattr(config, "hidden_dropout", None), float):  # Falcon reads it there
            config.hidden_dropout = 0.0
        for attribute in ("attention_dropout", "dropout", "layerdrop", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def _attention(asked: str | None) -> str | None:
    """``asked`` where it is installed; packed batches do not need it, so its absence is said and no error."""
    if asked is not None and asked.startswith("flash_attention"):
        package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(asked, asked)
        if importlib.util.find_spec(package) is None or not torch.cuda.is_available():
            logger.warning("attn_implementation: %s is not available here; generation uses the model's default", asked)
            return None
    return asked


def _load(auto: Any, name: str, arguments: ModelArguments, **options: Any) -> Any:
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise SimpoError(f"model_name_or_path: there is no folder {name!r}")
    try:
        return auto.from_pretrained(
            name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise SimpoError(f"model_name_or_path: {name!r} cannot be loaded: {reason[:300]}") from error
