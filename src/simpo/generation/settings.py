"""Sampling and engine settings, and derived seeds."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import yaml

from simpo.config import check_values, setting
from simpo.errors import SimpoError

_DEFAULT_MAX_NEW_TOKENS = 2048  # tokens


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings; temperature and top_p default to the paper's values."""

    n: int = setting(1, "Number of answers per prompt; simpo loop needs at least 2.", least=1, most=10_000)
    temperature: float = setting(0.8, "Sampling temperature; 0 decodes greedily.", least=0)
    top_p: float = setting(
        0.95, "Nucleus sampling: keep the likeliest tokens up to this total probability; 1 is off.", above=0, most=1
    )
    top_k: int = setting(0, "Sample only from the top_k likeliest tokens; 0 is off.", least=0)
    max_new_tokens: int | None = setting(
        None, "Maximum answer length in tokens (default: 2048, or half the model's context if that is less).", least=1
    )
    seed: int = setting(42, "Random seed; the same seed, prompts and settings give the same answers.", least=0)
    chunk_size: int | None = setting(
        None, "Answers generated and stored at a time (default: 32 on a CPU, 64 on a GPU, 1024 with vLLM).", least=1
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.greedy and self.n > 1:
            raise SimpoError(f"n: {self.n} greedy answers (temperature 0) would all be identical; set n to 1")

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature == 0

    def resolved(self, *, context: int | None, chunk_size: int) -> Self:
        """Return a copy with ``max_new_tokens`` and ``chunk_size`` filled in.

        ``context`` is the model's maximum number of positions, None if unlimited; unless ``max_new_tokens`` is given,
        half of it is reserved for the prompt. ``chunk_size`` is the engine's default.
        """
        longest = self.max_new_tokens
        if longest is None:
            longest = _DEFAULT_MAX_NEW_TOKENS if context is None else max(1, min(_DEFAULT_MAX_NEW_TOKENS, context // 2))
        elif context is not None and longest >= context:
            raise SimpoError(
                f"max_new_tokens: {longest} leaves no room for a prompt in the model's context of {context} tokens; "
                f"set it below {context}"
            )
        return replace(self, max_new_tokens=longest, chunk_size=self.chunk_size or chunk_size)


@dataclass
class VllmSettings:
    """Settings for the vLLM engine."""

    max_model_len: int | None = setting(None, "Maximum length of prompt plus answer, in tokens.")
    gpu_memory_utilization: float | None = setting(None, "Fraction of GPU memory that vLLM may use.")
    tensor_parallel_size: int | None = setting(None, "Number of GPUs to shard the model over.")
    engine_args: dict[str, Any] | list[str] | None = setting(
        None, "Additional vLLM engine arguments: KEY=VALUE ..., or a mapping."
    )

    def vllm_arguments(self) -> dict[str, Any]:
        """Merge all settings into keyword arguments for ``vllm.LLM``."""
        values = {field.name: getattr(self, field.name) for field in fields(VllmSettings)}
        merged = {key: value for key, value in values.items() if key != "engine_args" and value is not None}
        for given in [self.engine_args] if isinstance(self.engine_args, dict) else self.engine_args or []:
            arguments: Any = given
            if isinstance(given, str):
                key, equals, value = given.partition("=")
                with suppress(yaml.YAMLError):
                    arguments = yaml.safe_load(given) if given.startswith("{") else {key: yaml.safe_load(value)}
                if not isinstance(arguments, dict) or not (equals or given.startswith("{")):
                    raise SimpoError(f"engine_args: expected KEY=VALUE or a JSON object, got {given!r}")
            if duplicates := merged.keys() & arguments.keys():
                raise SimpoError(f"engine_args: {min(duplicates)} is given twice")
            merged |= arguments
        return merged


@dataclass
class EngineSettings(VllmSettings):
    """Settings for the engine that generates answers during training."""

    engine: Literal["transformers", "vllm"] = setting(
        "transformers", "Engine for generation: the model in memory, or vLLM, which reloads its weights from files."
    )

    def check_engine(self, longest: int) -> None:
        """Raise :class:`SimpoError` for vLLM settings without vLLM, or a context shorter than ``longest`` tokens."""
        changed = [field for field in fields(VllmSettings) if getattr(self, field.name) != field.default]
        if changed and self.engine != "vllm":
            raise SimpoError(f"{changed[0].name}: engine {self.engine} does not use it; remove it")
        context = self.vllm_arguments().get("max_model_len")
        if isinstance(context, int) and 0 <= context < longest:
            raise SimpoError(f"max_model_len: {context} is less than max_length {longest}; increase or remove it")


def derived_seed(seed: int, *numbers: int) -> int:
    """Derive a 63-bit seed for one part of a run, independent of random numbers drawn before it."""
    text = ":".join(map(str, (seed, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
