"""What a sampling run is made of: model, prompts and settings, read and checked before the weights are."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.data.prompts import Prompts, prepare_prompts
from simpo.data.settings import RenderSettings
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.sampling.engine import stop_ids
from simpo.sampling.loading import Checkpoint
from simpo.sampling.settings import SamplingSettings
from simpo.training.device import device
from simpo.training.identity import model_digest
from simpo.training.model_arguments import ModelArguments
from simpo.training.models import check_stored, load_tokenizer

EngineName = Literal["transformers", "vllm"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class PromptArguments:
    """Where the prompts come from (file, folder or hub id, split, renamed columns), and how they are rendered."""

    prompts: str
    split: str = "train"
    chat_template: str | None = None
    column_mapping: Mapping[str, str] | None = None
    rendering: RenderSettings = field(default_factory=RenderSettings)

    def rows(self) -> Dataset:
        """The rows that hold the prompts."""
        return load_rows(self.prompts, split=self.split, column_mapping=self.column_mapping)


@dataclass(frozen=True)
class Job:
    """Everything that determines the responses, with nothing left open."""

    checkpoint: Checkpoint
    engine: EngineName
    tokenizer: PreTrainedTokenizerBase
    source: PromptArguments
    prompts: Prompts
    settings: SamplingSettings
    stop_ids: list[int]
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        model: ModelArguments,
        source: PromptArguments,
        settings: SamplingSettings,
        engine: EngineName,
        say: Say,
        engine_args: Mapping[str, Any] = MappingProxyType({}),
    ) -> Job:
        """Read everything but the weights, and say what was found.

        ``engine_args`` are vLLM's; a ``max_model_len`` among them limits the model's context.

        Raises:
            SimpoError: model, prompts or settings cannot be used.
        """
        tokenizer = load_tokenizer(model.model_name_or_path, model, chat_template=source.chat_template)
        checkpoint = Checkpoint.read(model)
        if engine == "vllm":
            check_stored(checkpoint.arguments)
        say(f"model: {model.model_name_or_path} ({checkpoint.arguments.dtype} on {device()}, {engine})")
        limits = (checkpoint.context, engine_args.get("max_model_len"))
        context = min((limit for limit in limits if isinstance(limit, int)), default=None)
        settings = settings.resolved(context=context, chunk_size=_chunk_size(engine))
        say("sampling: " + ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(settings).items()))
        room = _room(context, settings, say)
        prompts = prepare_prompts(source.rows(), tokenizer, max_prompt_length=room, rendering=source.rendering)
        for line in prompts.report.lines():
            say(line)
        for prompt in prompts:
            if fault := checkpoint.limits.fault(0, prompt.ids):
                raise SimpoError(f"prompt {prompt.id}: {fault}; use the model's own tokenizer")
        stops = stop_ids(tokenizer, checkpoint.generation_config)
        return cls(checkpoint, engine, tokenizer, source, prompts, settings, stops, dict(engine_args))

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of every prompt."""
        return [prompt.ids for prompt in self.prompts]

    @property
    def total(self) -> int:
        """Responses in all."""
        return len(self.prompts) * self.settings.n

    def identity(self) -> dict[str, Any]:
        """What the responses depend on, as :meth:`simpo.runs.folder.RunFolder.begin` takes it."""
        return {
            "model": model_digest(self.checkpoint.arguments),
            "dtype": self.checkpoint.arguments.dtype,
            "engine": self.engine,
            "prompts": _digest(self.prompts),
            "stop_ids": str(self.stop_ids),
            **dataclasses.asdict(self.settings),
            **{f"engine_args/{key}": value for key, value in self.engine_args.items()},
        }

    def resolved(self) -> dict[str, Any]:
        """All that was given, nothing left open."""
        given = [dataclasses.asdict(part) for part in (self.checkpoint.arguments, self.source, self.settings)]
        return {"engine": self.engine, "engine_args": self.engine_args} | dict(
            item for part in given for item in part.items()
        )


def _room(context: int | None, settings: SamplingSettings, say: Say) -> int | None:
    """Tokens that a prompt may have."""
    assert settings.max_new_tokens is not None
    if context is None:
        return None
    room = context - settings.max_new_tokens
    say(f"the model's context of {context:,} tokens leaves {room:,} to a prompt (max_prompt_length)")
    return room


def _chunk_size(engine: EngineName) -> int:
    if engine == "vllm":  # which makes batches of its own
        return 1024
    return 32 if device().type == "cpu" else 64


def _digest(prompts: Prompts) -> str:
    """Of ids and tokens, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.id.encode() + array("q", [*prompt.ids, -1]).tobytes())
    return digest.hexdigest()
