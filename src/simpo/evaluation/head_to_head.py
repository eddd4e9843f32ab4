"""Two models' answers to the same prompts, sampled or read from files, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simpo.data.context import context_of
from simpo.data.prompts import read_prompts
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answerer, Record, file_digest, is_answer_file, read_answer_file
from simpo.generation.sample import FILE_NAME, EngineName, PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings
from simpo.judging.protocol import Pair
from simpo.models.loading import Checkpoint, free_memory
from simpo.models.settings import ModelArguments
from simpo.runs.log import Log
from simpo.runs.results import Metric, Stage, fingerprint
from simpo.statistics import Interval, mean_interval, proportion_interval, share_interval

# A number for one answer to a prompt.
Figure = Callable[[Any, str], float]


# Model ``a`` is compared with the baseline ``b``.
SIDES: dict[Stage, str] = {"before": "b", "after": "a"}


@dataclass(frozen=True)
class PromptAnswers:
    """Both models' answers to one prompt; model ``a`` is compared with the baseline ``b``.

    Attributes:
        prompt: text or messages.
        a: the answers of the one, one or more, as ``simpo sample`` stores them.
        b: the answers of the other.
    """

    prompt: Any
    a: Mapping[str, Any]
    b: Mapping[str, Any]


def read_contests(a: Path, b: Path) -> list[PromptAnswers]:
    """Pair two files of answers by prompt, in the order of the first.

    Raises:
        SimpoError: one cannot be read, they are not about the same prompts, or one id has two.
    """
    return match_answers(read_answer_file(a), read_answer_file(b), f"{a} and {b}")


def match_answers(a: Mapping[str, Record], b: Mapping[str, Record], names: str) -> list[PromptAnswers]:
    """Pair answers by prompt, in the order of the first.

    Args:
        a: the one's answers by the prompts' ids.
        b: the other's.
        names: of both, for the message.

    Raises:
        SimpoError: they are not about the same prompts, or one id has two.
    """
    if a.keys() != b.keys():
        raise SimpoError(
            f"{names}: {len(a.keys() ^ b.keys())} prompts are in one of them only; let both answer the same ones "
            "(a model leaves out those for which its context has no room)"
        )
    other = next((key for key, record in a.items() if record["prompt"] != b[key]["prompt"]), None)
    if other is not None:
        raise SimpoError(f"{names}: id {other!r} is another prompt in each; let both answer the same ones")
    return [PromptAnswers(record["prompt"], record, b[key]) for key, record in a.items()]


def meetings(contests: Sequence[PromptAnswers]) -> tuple[list[Pair], np.ndarray]:
    """Every answer of the one with every answer of the other to the same prompt, and the number of the prompt."""
    pairs, prompts = [], []
    for number, contest in enumerate(contests):
        ours, theirs = contest.a["responses"], contest.b["responses"]
        lone = len(ours) == len(theirs) == 1
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                key = contest.a["id"] if lone else f"{contest.a['id']}/{i}-{j}"
                pairs.append(Pair(key, contest.prompt, a, b, context_of(contest.a)))
                prompts.append(number)
    return pairs, np.array(prompts)


def win_rate(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Interval:
    """Share of comparisons that ``a`` wins, ties half, with an interval over prompts.

    Every answer of ``a`` meets every answer of ``b`` to the same prompt; a prompt's share is one observation, because
    answers to one prompt are not independent.

    Args:
        a: for each prompt, the scores of the one's answers.
        b: the same of the other's.
    """
    return share_interval([_share(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)])


def _share(x: np.ndarray, y: np.ndarray) -> float:
    difference = x[:, None] - y[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def compare_answers(contests: Sequence[PromptAnswers], score: Figure, others: Mapping[str, Figure]) -> list[Metric]:
    """Figures of the baseline ("before") and of the model ("after"), and the model's win rate, over prompts.

    Args:
        contests: the answers; ``a`` is the model, ``b`` the baseline.
        score: decides who wins, from prompt and answer; the higher, the better.
        others: further figures by name.
    """
    ours, theirs = (_values(contests, side, score) for side in ("a", "b"))
    metrics = [Metric.of("win_rate", win_rate(ours, theirs), "after")]
    for name, figure in {"score": score, **others}.items():
        for stage, side in SIDES.items():
            values = _values(contests, side, figure)
            interval = share_interval if {x for found in values for x in found} <= {0.0, 1.0} else mean_interval
            metrics.append(Metric.of(name, interval([float(np.mean(found)) for found in values]), stage))
    return metrics + sampled_metrics(contests)


def sampled_metrics(contests: Sequence[PromptAnswers]) -> list[Metric]:
    """How long sampled answers are in tokens, over prompts, and how many ended, over answers."""
    metrics = []
    for stage, side in SIDES.items():
        records = [getattr(contest, side) for contest in contests]
        lengths = [float(np.mean([len(ids) for ids in record["response_ids"]])) for record in records]
        ended = [finished for record in records for finished in record["finished"]]
        metrics.append(Metric.of("response_tokens", mean_interval(lengths), stage))
        metrics.append(Metric.of("end_of_turn_rate", proportion_interval(sum(ended), len(ended)), stage))
    return metrics


def text_metrics(contests: Sequence[PromptAnswers]) -> list[Metric]:
    """How long answers are in characters, over prompts, and how many are empty."""
    metrics = []
    for stage, side in SIDES.items():
        answers = [getattr(contest, side)["responses"] for contest in contests]
        lengths = [float(np.mean([len(text) for text in texts])) for texts in answers]
        empty = [not text.strip() for texts in answers for text in texts]
        metrics.append(Metric.of("response_characters", mean_interval(lengths), stage))
        metrics.append(Metric("empty_responses", sum(empty), stage, len(empty)))
    return metrics


def _values(contests: Sequence[PromptAnswers], side: str, figure: Figure) -> list[list[float]]:
    return [
        [float(figure(contest.prompt, text)) for text in getattr(contest, side)["responses"]] for contest in contests
    ]


# ---- What is compared: a model that will be sampled, or answers that are there.


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


class Side(Protocol):
    """One side of a comparison."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines its answers, as JSON values."""
        ...

    def answers(self, folder: Path, log: Log) -> Path:
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


def contenders(a: str, b: str, sampled: SampledWith) -> tuple[Side, Side]:
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
    return path if path.is_file() or is_answer_file(name) else None


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

    def answers(self, folder: Path, log: Log) -> Path:
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
        prompts, _ = read_prompts(self.prompts.rows())
        return self.answerer.identity() | {"prompts": fingerprint([prompt.id for prompt in prompts])}

    def answers(self, folder: Path, log: Log) -> Path:
        model = self.answerer.model
        log(f"answers of {folder.name.upper()}, {model.model_name_or_path}:")
        sample_responses(model, self.prompts, self.answerer.settings, folder, engine=self.answerer.engine)
        free_memory()
        return folder / FILE_NAME

    def expected(self, folder: Path) -> dict[str, Record]:
        if (folder / FILE_NAME).exists():
            return read_answer_file(folder / FILE_NAME)
        responses = [self.answerer.stand_in(f"{folder.name}{i}") for i in range(self.answerer.settings.n)]
        prompts = self.answerer.fitting(self.prompts)
        return {one.id: {"id": one.id, "prompt": one.content, "responses": responses} for one in prompts}
