"""Settings for the model: where it is, how to load it, and which adapter to train."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from simpo.config import check_values, required, setting
from simpo.errors import SimpoError

# The recipe keys of an adapter, with peft's name and the default.
LORA: dict[str, tuple[str, Any]] = {
    "lora_r": ("r", 16),
    "lora_alpha": ("lora_alpha", 32),
    "lora_dropout": ("lora_dropout", 0.05),
    "lora_target_modules": ("target_modules", "all-linear"),
    "lora_modules_to_save": ("modules_to_save", None),
    "use_rslora": ("use_rslora", False),
}
# The recipe keys of a 4-bit base model, with their defaults.
_QUANTIZATION: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False}
MOST_RANK = 16_384  # more than the width of almost all layers, beyond which a higher rank adds nothing
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class ModelArguments:
    """Where the model is, how to load it, and which adapter to train."""

    model_name_or_path: str = required("Model name on the hub, or folder.", positional="MODEL")
    model_revision: str = setting("main", "Branch, tag or commit on the hub.")
    dtype: str | None = setting(
        None,
        "Data type of the weights: float32, bfloat16, float16, or auto for that of the files (default: float32; for "
        "sampling and judging on a GPU bfloat16).",
    )
    attn_implementation: str | None = setting(
        None, "Attention implementation for generation; packed batches choose their own."
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")
    allow_pickle: bool = setting(False, "Allow weights stored as pickles (pytorch_model.bin).")

    save_dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, "Data type to round the finished model to when saving (default: as trained)."
    )

    use_peft: bool = setting(False, "Train a LoRA adapter and freeze the model's own weights.")
    lora_r: int | None = setting(None, "Rank of the adapter (default: 16).", least=1, most=MOST_RANK)
    lora_alpha: int | None = setting(
        None, "Scale of the adapter: its output is multiplied by lora_alpha / lora_r (default: 32).", least=1
    )
    lora_dropout: float | None = setting(
        None, "Dropout before the adapter (default: 0.05); applies only if disable_dropout is false.", least=0, below=1
    )
    lora_target_modules: list[str] | None = setting(
        None, "Name endings of the layers to adapt (default: all linear layers except the output layer)."
    )
    lora_modules_to_save: list[str] | None = setting(
        None, "Name endings of modules to train fully, in addition to the adapter."
    )
    use_rslora: bool | None = setting(None, "Divide lora_alpha by the square root of lora_r instead (default: false).")
    load_in_4bit: bool = setting(False, "QLoRA: load the model's own weights in 4 bits; needs bitsandbytes.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = setting(None, "4-bit data type (default: nf4).")
    use_bnb_nested_quant: bool | None = setting(
        None, "Quantize the scales of the 4-bit weights as well, to 8 bits (default: false)."
    )

    @classmethod
    def of(cls, model: str | ModelArguments) -> ModelArguments:
        """Return the defaults for a model's name or folder; arguments are returned unchanged."""
        return cls(model) if isinstance(model, str) else model

    def __post_init__(self) -> None:
        if self.model_name_or_path.startswith("~"):
            self.model_name_or_path = os.path.expanduser(self.model_name_or_path)  # noqa: PTH111 - no error for ~nobody
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise SimpoError(f"dtype: {self.dtype!r} is not one of {', '.join(_DTYPES)}")
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise SimpoError(
                f"attn_implementation: {self.attn_implementation!r} is code from the hub; allow it with "
                "trust_remote_code"
            )
        check_values(self)
        for key in _QUANTIZATION:
            if getattr(self, key) is not None and not self.load_in_4bit:
                raise SimpoError(f"{key}: applies only to 4-bit models; set load_in_4bit: true, or leave it out")

    @property
    def lora(self) -> dict[str, Any]:
        """The adapter settings that were given."""
        given = {key: getattr(self, key) for key in LORA if getattr(self, key) is not None}
        if self.lora_target_modules == ["all-linear"]:  # peft's name for the default
            given["lora_target_modules"] = "all-linear"
        return given

    @property
    def new_adapter(self) -> dict[str, Any]:
        """All settings of a new adapter, defaults included; empty without ``use_peft``."""
        return {key: default for key, (_, default) in LORA.items()} | self.lora if self.use_peft else {}

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization settings of the base model; empty if it is not quantized."""
        if not self.load_in_4bit:
            return {}
        given = {key: getattr(self, key) for key in _QUANTIZATION if getattr(self, key) is not None}
        return {"load_in_4bit": True, **_QUANTIZATION, **given}
