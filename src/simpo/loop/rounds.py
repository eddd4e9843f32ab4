"""One round: the last model answers, its answers are scored and paired, a new model is trained and meets the start."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simpo.evaluation.compare import CompareArguments, compare
from simpo.evaluation.contenders import SampledWith
from simpo.judges.annotate import AnnotateArguments, annotate
from simpo.judges.registry import JudgeOptions
from simpo.loop.drift import drift
from simpo.loop.record import Stage, write_round
from simpo.loop.settings import LoopRecipe
from simpo.results import FILE_NAME as RESULTS
from simpo.results import Metric, read_results, write_results
from simpo.sampling.pairing import FILE_NAME as PAIRS
from simpo.sampling.pairing import pair_annotated
from simpo.sampling.run import FILE_NAME as RESPONSES
from simpo.sampling.run import PromptArguments, sample_responses
from simpo.sampling.settings import SamplingSettings, derived_seed
from simpo.training.device import free_memory
from simpo.training.inputs import DataArguments
from simpo.training.model_arguments import ModelArguments
from simpo.training.run import Given, run_training
from simpo.training.tasks import PREFERENCES

START = "start-answers"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rounds:
    """What all rounds have in common.

    Attributes:
        folder: of the loop.
        recipe: of the loop.
        options: what annotator and judges need.
        fingerprint: of the loop.
        say: gets a line for every stage.
    """

    folder: Path
    recipe: LoopRecipe
    options: JudgeOptions
    fingerprint: str
    say: Say

    @property
    def judges(self) -> list[str]:
        """Names of those who compare a round with the start."""
        return self.recipe.settings.judges or [self.recipe.settings.annotator]

    @property
    def _held_out(self) -> PromptArguments:
        settings = self.recipe.settings
        return PromptArguments(settings.eval_prompts, settings.eval_prompts_split, settings.chat_template)

    @property
    def _held_out_sampling(self) -> SamplingSettings:
        """The same for every model, and another seed than any round's."""
        sampling = self.recipe.sampling
        return dataclasses.replace(sampling, n=self.recipe.settings.eval_n, seed=derived_seed(sampling.seed, 0))

    def model(self, number: int) -> Path:
        """Folder of a round's model."""
        return self.folder / f"round-{number}" / "model"

    def answer_from_start(self) -> None:
        """The start model's answers to the held-out prompts."""
        self.say("the start answers the held-out prompts")
        self._sample(self._sampled(0), self._held_out, self._held_out_sampling, self.folder / START)

    def run(self, number: int) -> list[Metric]:
        """All stages of a round, each its own run, so that a loop that was killed goes on where it was.

        Raises:
            SimpoError: as the stages' commands.
            InterruptedRun: a signal came.
        """
        folder, settings = self.folder / f"round-{number}", self.recipe.settings
        responses, annotated, pairs, answers, comparison = (
            folder / name for name in ("responses", "annotated", "pairs", "answers", "comparison")
        )
        before = self._sampled(number - 1)
        self._announce(number, f"{before.model_name_or_path} answers")
        asked = PromptArguments(settings.prompts, settings.prompts_split, settings.chat_template)
        drawn = dataclasses.replace(self.recipe.sampling, seed=derived_seed(self.recipe.sampling.seed, number))
        self._sample(before, asked, drawn, responses)
        self._announce(number, f"{settings.annotator} scores the answers")
        annotate(AnnotateArguments(responses, settings.annotator, self.options, yes=settings.yes), annotated)
        free_memory()
        self._announce(number, "answers become pairs")
        pair_annotated(annotated, self.recipe.pairs, pairs)
        self._announce(number, "a model is trained on them")
        self._train(number, pairs / PAIRS)
        self._announce(number, "it answers the held-out prompts and meets the start")
        self._sample(self._sampled(number), self._held_out, self._held_out_sampling, answers)
        sampled = SampledWith(None, "train", self._held_out_sampling)
        sides = str(answers), str(self.folder / START)
        compare(CompareArguments(*sides, sampled, self.judges, self.options, yes=settings.yes), comparison)
        free_memory()
        metrics = [_rows(pairs), *_compared(comparison), self._drift(answers)]
        free_memory()
        write_results(folder, command="loop", fingerprint=self.fingerprint, metrics=metrics)
        last = self.model(number - 1) if number > 1 else self.recipe.model.model_name_or_path
        stages = {
            "responses": Stage(responses, {"model": last, "prompts": settings.prompts}),
            "annotated": Stage(annotated, {"responses": responses, "annotator": settings.annotator}),
            "pairs": Stage(pairs, {"annotated": annotated}),
            "model": Stage(self.model(number), {"model": last, "pairs": pairs}),
            "answers": Stage(answers, {"model": self.model(number), "prompts": settings.eval_prompts}),
            "comparison": Stage(comparison, {"answers": answers, "start": self.folder / START}),
        }
        write_round(folder, number, stages)
        return metrics

    def _announce(self, number: int, what: str) -> None:
        self.say(f"round {number} of {self.recipe.settings.rounds}: {what}")

    def _arguments(self, number: int) -> ModelArguments:
        """A round's model as training takes it; the start before the first."""
        if number == 0:
            return self.recipe.model
        return dataclasses.replace(self.recipe.model, model_name_or_path=str(self.model(number)), model_revision="main")

    def _sampled(self, number: int) -> ModelArguments:
        """A round's model as it is: without an adapter that training would put on it."""
        found = self._arguments(number)
        return ModelArguments(
            found.model_name_or_path,
            found.model_revision,
            found.dtype,
            found.attn_implementation,
            found.trust_remote_code,
        )

    def _sample(self, model: ModelArguments, asked: PromptArguments, drawn: SamplingSettings, folder: Path) -> None:
        sample_responses(model, asked, drawn, folder, engine=self.recipe.settings.engine)
        free_memory()

    def _train(self, number: int, pairs: Path) -> None:
        config = copy.deepcopy(self.recipe.config)
        config.output_dir = str(self.model(number))
        data = DataArguments(dataset_name=str(pairs), chat_template=self.recipe.settings.chat_template)
        run_training(PREFERENCES, Given(self._arguments(number - 1), data, config))
        free_memory()

    def _drift(self, answers: Path) -> Metric:
        found = drift(answers / RESPONSES, self._sampled(0), self._held_out)
        return Metric("kl", found.value, None, found.n, found.low, found.high, found.method)


def _rows(folder: Path) -> Metric:
    found = next(metric for metric in read_results(folder / RESULTS).metrics if metric.name == "pair/rows")
    return dataclasses.replace(found, name="rows")


def _compared(folder: Path) -> list[Metric]:
    """What the judges said, and how long answers are; the start's figures are the stage ``before``."""
    wanted = ("win_rate/", "agreement/", "kappa/", "response_tokens", "end_of_turn_rate")
    return [metric for metric in read_results(folder / RESULTS).metrics if metric.name.startswith(wanted)]
