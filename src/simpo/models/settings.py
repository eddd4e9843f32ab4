"""Which model, how it is loaded, and the adapter that is trained on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from simpo.config import check_values, required, setting
from simpo.errors import SimpoError

# The keys of an adapter: peft's name, and the default.
LORA: dict[str, tuple[str, Any]] = {
    "lora_r": ("r", 16),
    "lora_alpha": ("lora_alpha", 32),
    "lora_dropout": ("lora_dropout", 0.05),
    "lora_target_modules": ("target_modules", "all-linear"),
    "lora_modules_to_save": ("modules_to_save", None),
    "use_rslora": ("use_rslora", False),
}
# The keys of a base model in 4 bits, and their defaults.
_QUANTIZATION: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False}
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class ModelArguments:
    """Which model, how it is loaded, and the adapter that is trained on it."""

    model_name_or_path: str = required("Hub name or folder of the model.", positional="MODEL")
    model_revision: str = setting("main", "Branch, tag or commit on the hub.")
    dtype: str | None = setting(
        None, "Type of the weights: float32 (default), bfloat16, float16, or auto for the files' own."
    )
    attn_implementation: str | None = setting(
        None, "Attention outside packed batches (generation); packed ones choose theirs."
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")
    allow_pickle: bool = setting(False, "Read weights that are stored as pickles (pytorch_model.bin).")

    save_dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, "Type that the finished model is rounded to when saved (default: as trained)."
    )

    use_peft: bool = setting(False, "Train a LoRA adapter, and leave the model's own weights as they are.")
    lora_r: int | None = setting(None, "Rank of the adapter (default: 16).", least=1)
    lora_alpha: int | None = setting(
        None, "The adapter's output is multiplied by lora_alpha / lora_r (default: 32).", least=1
    )
    lora_dropout: float | None = setting(
        None, "Dropout before the adapter (default: 0.05); none unless disable_dropout is false.", least=0, below=1
    )
    lora_target_modules: list[str] | None = setting(
        None, "Ends of the names of the layers that get one (default: every linear layer but the output)."
    )
    lora_modules_to_save: list[str] | None = setting(
        None, "Ends of the names of modules that are trained whole, next to the adapter."
    )
    use_rslora: bool | None = setting(None, "Divide lora_alpha by the square root of lora_r instead (default: false).")
    load_in_4bit: bool = setting(False, "QLoRA: the model's own weights in 4 bits; needs bitsandbytes.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = setting(None, "Kind of 4-bit numbers (default: nf4).")
    use_bnb_nested_quant: bool | None = setting(
        None, "Store the scales of 4-bit numbers in 8 bits as well (default: false)."
    )

    @classmethod
    def of(cls, model: str | ModelArguments) -> ModelArguments:
        """The defaults for a model's name or folder; arguments as they are."""
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
                raise SimpoError(f"{key}: only a model in 4 bits takes it; set load_in_4bit: true, or leave it out")

    @property
    def lora(self) -> dict[str, Any]:
        """The adapter's settings that were given."""
        given = {key: getattr(self, key) for key in LORA if getattr(self, key) is not None}
        if self.lora_target_modules == ["all-linear"]:  # peft's word for the default
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
