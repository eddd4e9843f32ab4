"""What is compared: a model that will be sampled, or answers that are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from simpo.data.prompts import read_prompts
from simpo.data.settings import RenderSettings
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.evaluation.answer_files import Record, read_answer_file
from simpo.evaluation.answers import Answerer, is_outputs_file
from simpo.evaluation.rows import file_digest
from simpo.results import fingerprint
from simpo.sampling.loading import Checkpoint
from simpo.sampling.run import FILE_NAME, EngineName, PromptArguments, sample_responses
from simpo.sampling.settings import SamplingSettings
from simpo.training.device import free_memory
from simpo.training.model_arguments import ModelArguments

Say = Callable[[str], None]


@dataclass(frozen=True)
class SampledWith:
    """How models answer.

    Attributes:
        prompts: what they are asked; None for the prompts of the answers that they are compared with.
        split: of the prompts.
        settings: how answers are drawn.
        engine: what generates.
        dtype: type of the weights; None chooses by the device.
        trust_remote_code: run code that comes with a model.
        rendering: how prompts are rendered.
    """

    prompts: str | None
    split: str
    settings: SamplingSettings
    engine: EngineName = "transformers"
    dtype: str | None = None
    trust_remote_code: bool = False
    rendering: RenderSettings = field(default_factory=RenderSettings)


class Contender(Protocol):
    """One side of a comparison."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines its answers, as JSON values."""
        ...

    def answers(self, folder: Path, say: Say) -> Path:
        """A file of its answers, made in ``folder`` if need be.

        Raises:
            SimpoError: they cannot be made.
        """
        ...

    def expected(self, folder: Path) -> dict[str, Record]:
        """Its answers by the prompts' ids; where they are not there yet, texts as long as they may be.

        Raises:
            SimpoError: the prompts cannot be read, or the model has no room for any of them.
        """
        ...


def contenders(a: str, b: str, sampled: SampledWith) -> tuple[Contender, Contender]:
    """Both sides: a file of answers, the folder of a run of ``simpo sample``, or else a model.

    Raises:
        SimpoError: a side cannot be used, or it is not said what models are to be asked.
    """
    files = [_answer_file(name) for name in (a, b)]
    given = next((str(path) for path in files if path is not None), None)
    if None not in files and sampled.prompts is not None:
        raise SimpoError("prompts: both sides are answers, which have their own; leave --prompts out")
    if sampled.prompts is None:
        if given is None:
            raise SimpoError("prompts: name what the models are to be asked with --prompts")
        sampled = replace(sampled, prompts=given, split="train")
    first, second = (
        _Model.of(name, sampled) if path is None else _File.of(path) for name, path in zip((a, b), files, strict=True)
    )
    return first, second


def _answer_file(name: str) -> Path | None:
    path = Path(name).expanduser()
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    return path if path.is_file() or is_outputs_file(name) else None


@dataclass(frozen=True)
class _File:
    path: Path

    @classmethod
    def of(cls, path: Path) -> _File:
        read_answer_file(path)
        return cls(path)

    @property
    def identity(self) -> dict[str, Any]:
        return {"answers": file_digest(self.path)}

    def answers(self, folder: Path, say: Say) -> Path:
        return self.path

    def expected(self, folder: Path) -> dict[str, Record]:
        return read_answer_file(self.path)


@dataclass(frozen=True)
class _Model:
    answerer: Answerer
    prompts: PromptArguments

    @classmethod
    def of(cls, name: str, sampled: SampledWith) -> _Model:
        assert sampled.prompts is not None
        model = ModelArguments(name, dtype=sampled.dtype, trust_remote_code=sampled.trust_remote_code)
        arguments, rendering = Checkpoint.read(model).arguments, sampled.rendering
        answerer = Answerer(arguments, sampled.settings, engine=sampled.engine, rendering=rendering)
        return cls(answerer, PromptArguments(sampled.prompts, sampled.split, rendering=rendering))

    @property
    def identity(self) -> dict[str, Any]:
        prompts, _ = read_prompts(load_rows(self.prompts.prompts, split=self.prompts.split))
        return self.answerer.identity() | {"prompts": fingerprint([prompt.id for prompt in prompts])}

    def answers(self, folder: Path, say: Say) -> Path:
        model = self.answerer.model
        say(f"answers of {folder.name.upper()}, {model.model_name_or_path}:")
        sample_responses(model, self.prompts, self.answerer.settings, folder, engine=self.answerer.engine)
        free_memory()
        return folder / FILE_NAME

    def expected(self, folder: Path) -> dict[str, Record]:
        if (folder / FILE_NAME).exists():
            return read_answer_file(folder / FILE_NAME)
        responses = [self.answerer.stand_in(f"{folder.name}{i}") for i in range(self.answerer.settings.n)]
        prompts = self.answerer.fitting(self.prompts)
        return {one.id: {"id": one.id, "prompt": one.content, "responses": responses} for one in prompts}
