"""Describes a model before its weights are read: its limits, generation settings and digest."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from simpo.errors import third_party
from simpo.models.adapters import find_adapter
from simpo.models.devices import device
from simpo.models.files import indexed_files
from simpo.models.loading import base_arguments, base_model_of, generation_config, load_files, load_model
from simpo.models.settings import ModelArguments
from simpo.runs.manifest import file_digest

_FILES = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*config.json",
    "tokenizer.*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
)  # fmt: skip
_INDEXES = ("*.safetensors.index.json", "*.bin.index.json")


def load_config(arguments: ModelArguments) -> Any:
    """Load the configuration of a model, or of an adapter's base model."""
    return load_files(AutoConfig, base_model_of(arguments))


def with_dtype(model: ModelArguments) -> ModelArguments:
    """Fill in the dtype of the weights, unless given: bf16 on an accelerator, fp32 on a CPU."""
    chosen = model.dtype or ("float32" if device().type == "cpu" else "bfloat16")
    return dataclasses.replace(model, dtype=chosen)


def model_digest(model: ModelArguments) -> str:
    """Return the SHA-256 of a local model's files, including an adapter's base model, or a hub model's name.

    The files are the weights, the configurations and the tokenizer's, because answers are decoded with it.
    """
    folder = Path(model.model_name_or_path)
    found = {path for pattern in _FILES for path in folder.glob(pattern)}
    found |= {folder / name for pattern in _INDEXES for name in indexed_files(folder, pattern)}
    files = sorted(path for path in found if path.is_file())
    if not files:
        return f"{model.model_name_or_path}@{model.model_revision}"
    digests = [file_digest(path) for path in files]
    adapter = find_adapter(model.model_name_or_path, model.model_revision)
    if adapter is not None:
        digests.append(model_digest(base_arguments(adapter, model)))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def display_name(name: str) -> str:
    """Return a hub name unchanged, and only the last part of a local path, which reveals nothing about the machine."""
    return Path(name).name if Path(name).exists() else name


@dataclass(frozen=True)
class Limits:
    """The longest text and the token ids that a model can read, according to its configuration."""

    # Maximum length in tokens; None if there is no bound (no positions, ALiBi, dynamic RoPE scaling).
    positions: int | None
    embeddings: int | None  # number of token ids; None if the configuration does not give it

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Read the limits from a model's configuration; values that make no sense raise :class:`SimpoError`."""
        text = config.get_text_config()
        with third_party(f"model_name_or_path: {config.name_or_path!r}: config.json: the position limits are invalid"):
            return cls(_positions(text), getattr(text, "vocab_size", None))

    def fault(self, length: int, ids: Iterable[int] = ()) -> str | None:
        """Explain why a model cannot read ``length`` tokens of prompt and answer with these ids; None if it can."""
        if self.positions is not None and length > self.positions:
            return f"{length:,} tokens with its answer; the model has room for {self.positions:,}"
        if self.embeddings is not None:
            for token_id in ids:
                if not 0 <= token_id < self.embeddings:
                    return f"token id {token_id}; the model has embeddings for 0 to {self.embeddings - 1}"
        return None


def _positions(text: Any) -> int | None:
    limit = getattr(text, "max_position_embeddings", None)
    ropes = getattr(text, "rope_parameters", None) or {}
    ropes = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
    if limit is None or getattr(text, "alibi", False) or any(rope["rope_type"] == "dynamic" for rope in ropes):
        return None
    for rope in ropes:  # YaRN does not require raising max_position_embeddings
        if rope["rope_type"] == "yarn" and rope.get("original_max_position_embeddings"):
            limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return limit


@dataclass(frozen=True)
class Checkpoint:
    """A model whose weights have not been read yet."""

    arguments: ModelArguments  # where it is and how to load it, with the dtype filled in
    limits: Limits  # what it can read
    generation_config: GenerationConfig  # its generation settings

    @property
    def context(self) -> int | None:
        """The context length in tokens; None if there is no bound."""
        return self.limits.positions

    @classmethod
    def read(cls, arguments: ModelArguments) -> Checkpoint:
        """Read the configuration of a model on disk or on the hub, and choose the dtype of its weights."""
        config = load_config(arguments)
        base = base_model_of(arguments)
        generation = generation_config(arguments.model_name_or_path, arguments.model_revision)
        generation = generation or generation_config(base.model_name_or_path, base.model_revision)
        return cls(
            with_dtype(arguments),
            Limits.of(config),
            generation or GenerationConfig.from_model_config(config),  # the file is optional
        )

    def load(self) -> PreTrainedModel:
        """Load the model onto the accelerator, if there is one."""
        model: Any = load_model(self.arguments)
        return model.to(device())
