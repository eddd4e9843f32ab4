"""Settings for sampling responses, and derived seeds."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import yaml

from simpo.config import check_values, setting
from simpo.errors import SimpoError

_LONGEST_BY_DEFAULT = 2048  # tokens


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling with the paper's temperature and top_p by default."""

    n: int = setting(1, "Answers to every prompt.", least=1)
    temperature: float = setting(0.8, "Divides the logits; 0 takes the likeliest token every time.", least=0)
    top_p: float = setting(
        0.95, "Draw from the smallest set of tokens with this probability; 1 is off.", above=0, most=1
    )
    top_k: int = setting(0, "Draw from this many likeliest tokens; 0 is off.", least=0)
    max_new_tokens: int | None = setting(
        None, "Longest answer in tokens (default: 2048, or half the model's context if that is less).", least=1
    )
    seed: int = setting(42, "With prompts and settings, determines every answer.", least=0)
    chunk_size: int | None = setting(
        None, "Answers generated and stored together (default: 32 on a CPU, 64 on a GPU, 1024 with vLLM).", least=1
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.greedy and self.n > 1:
            raise SimpoError(f"n: {self.n} greedy answers (temperature 0) would be identical; set n to 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def resolved(self, *, context: int | None, chunk_size: int) -> Self:
        """The settings with ``max_new_tokens`` and ``chunk_size`` filled in.

        ``context`` are the positions that the model has, None if unlimited; half of them are left to the prompts unless
        ``max_new_tokens`` is given. ``chunk_size`` is the default for this engine.
        """
        longest = self.max_new_tokens
        if longest is None:
            longest = _LONGEST_BY_DEFAULT if context is None else max(1, min(_LONGEST_BY_DEFAULT, context // 2))
        elif context is not None and longest >= context:
            raise SimpoError(
                f"max_new_tokens: {longest} leave no room for a prompt in the model's context of {context} tokens; "
                f"set it below {context}"
            )
        return replace(self, max_new_tokens=longest, chunk_size=self.chunk_size or chunk_size)


@dataclass
class VllmSettings:
    """vLLM's engine."""

    max_model_len: int | None = setting(None, "Longest prompt and answer, in tokens.")
    gpu_memory_utilization: float | None = setting(None, "Share of the GPU's memory that it may use.")
    tensor_parallel_size: int | None = setting(None, "GPUs that share the model.")
    engine_args: dict[str, Any] | list[str] | None = setting(
        None, "Other arguments of its engine: KEY=VALUE ..., or a mapping."
    )

    def vllm_arguments(self) -> dict[str, Any]:
        """All arguments of the engine."""
        own = {field.name: getattr(self, field.name) for field in fields(VllmSettings)}
        found = {key: value for key, value in own.items() if key != "engine_args" and value is not None}
        for given in [self.engine_args] if isinstance(self.engine_args, dict) else self.engine_args or []:
            arguments: Any = given
            if isinstance(given, str):
                key, equals, value = given.partition("=")
                with suppress(yaml.YAMLError):
                    arguments = yaml.safe_load(given) if given.startswith("{") else {key: yaml.safe_load(value)}
                if not isinstance(arguments, dict) or not (equals or given.startswith("{")):
                    raise SimpoError(f"engine_args: {given!r}: expected KEY=VALUE or a JSON object")
            if twice := found.keys() & arguments.keys():
                raise SimpoError(f"engine_args: {min(twice)} is given twice")
            found |= arguments
        return found


@dataclass
class EngineSettings(VllmSettings):
    """The engine that generates answers during training."""

    engine: Literal["transformers", "vllm"] = setting(
        "transformers", "What generates the answers: the model in memory, or vLLM, which reads its weights from files."
    )

    def check_engine(self, longest: int) -> None:
        """Raise :class:`SimpoError` for vLLM's arguments without it, or with less room than ``longest`` tokens."""
        own = [field for field in fields(VllmSettings) if getattr(self, field.name) != field.default]
        if own and self.engine != "vllm":
            raise SimpoError(f"{own[0].name}: engine {self.engine} does not use it; leave it out")
        room = self.vllm_arguments().get("max_model_len")
        if isinstance(room, int) and 0 <= room < longest:
            raise SimpoError(f"max_model_len: {room} leaves less room than max_length {longest}; leave it out")


def derived_seed(seed: int, *numbers: int) -> int:
    """A 63-bit seed for one part of a run, which does not depend on what was drawn before it."""
    text = ":".join(map(str, (seed, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
