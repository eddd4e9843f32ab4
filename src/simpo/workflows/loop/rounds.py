"""One round: answers are sampled, scored and paired, a model is trained, and compared with the start."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simpo.data.prompts import prepare_prompts
from simpo.evaluation.compare import CompareArguments, SampledWith, compare
from simpo.generation.sample import FILE_NAME as RESPONSES
from simpo.generation.sample import PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.judging.annotate import AnnotateArguments, annotate
from simpo.judging.registry import JudgeOptions
from simpo.models.checkpoint import Checkpoint
from simpo.models.devices import free_memory
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.packing.forward import score_responses
from simpo.packing.layout import TokenizedComparison
from simpo.runs.lines import read_lines
from simpo.runs.log import Log
from simpo.runs.results import FILE_NAME as RESULTS
from simpo.runs.results import Metric, read_results, write_results
from simpo.statistics import Interval, mean_interval
from simpo.training.run import TrainingJob, run_training
from simpo.training.settings import DataArguments
from simpo.training.tasks import PREFERENCES
from simpo.workflows.loop.record import Stage, write_round
from simpo.workflows.loop.settings import LoopRecipe, as_it_is
from simpo.workflows.pair import FILE_NAME as PAIRS
from simpo.workflows.pair import pair_annotated

# ---- How far a model has moved from another, measured on its own answers.


_BATCH_TOKENS = 16384


def drift(answers: Path, start: ModelArguments, asked: PromptArguments) -> Interval:
    """Mean of ``log pi(y | x) - log pi_start(y | x)`` over answers ``y`` of ``pi``, in nats; interval over prompts.

    An unbiased estimate of KL(pi || pi_start) where the answers are drawn at temperature 1 from the whole distribution;
    with other settings a measure of the same kind for what is sampled then.

    Args:
        answers: ``responses.jsonl`` of the model that has moved, with token ids and log-probabilities.
        start: the model that it is measured from.
        asked: what the answers answer.

    Raises:
        SimpoError: the file, the prompts or the model cannot be read.
    """
    records = read_lines(answers)
    tokenizer = load_tokenizer(start.model_name_or_path, start, chat_template=asked.chat_template)
    rows = asked.rows()
    prompts = {prompt.id: prompt.ids for prompt in prepare_prompts(rows, tokenizer, rendering=asked.rendering)}
    comparisons = [TokenizedComparison(prompts[record["id"]], record["response_ids"]) for record in records]
    longest = max(max(one.packed_length, one.padded_length) for one in comparisons)
    model = Checkpoint.read(start).load().eval()
    with torch.no_grad():
        logps = score_responses(model, comparisons, max_batch_tokens=max(_BATCH_TOKENS, longest)).logp.tolist()
    there = iter(logps)
    ratios = [np.mean([here - next(there) for here in record["logps"]]) for record in records]
    return mean_interval(np.array(ratios))


START = "start-answers"


_AGREED = True  # what a server will be sent was agreed to before the first round


@dataclass(frozen=True)
class Rounds:
    """What all rounds have in common.

    Attributes:
        folder: of the loop.
        recipe: of the loop.
        options: what annotator and judges need.
        fingerprint: of the loop.
        log: called with a line for every stage.
    """

    folder: Path
    recipe: LoopRecipe
    options: JudgeOptions
    fingerprint: str
    log: Log

    def model(self, number: int) -> Path:
        """Folder of a round's model."""
        return self.folder / f"round-{number}" / "model"

    def answer_from_start(self) -> None:
        """The start model's answers to the held-out prompts."""
        self.log("the start answers the held-out prompts")
        self._sample(self._sampled(0), self.recipe.held_out, self.recipe.held_out_sampling, self.folder / START)

    def run(self, number: int) -> list[Metric]:
        """All stages of a round, each its own run, so that a loop that was killed goes on where it was.

        Raises:
            SimpoError: as the stages' commands.
            InterruptedRun: a signal came.
        """
        folder = self.folder / f"round-{number}"
        self._make_pairs(number, folder)
        self._train(number, folder / "pairs" / PAIRS)
        self._meet_start(number, folder)
        metrics = [_rows(folder / "pairs"), *_compared(folder / "comparison"), self._drift(folder / "answers")]
        free_memory()
        write_results(folder, command="loop", fingerprint=self.fingerprint, metrics=metrics)
        write_round(folder, number, self._stages(number, folder))
        return metrics

    def _make_pairs(self, number: int, folder: Path) -> None:
        """The last model's answers to the prompts, scored and paired."""
        settings, sampling, before = self.recipe.settings, self.recipe.sampling, self._sampled(number - 1)
        self._announce(number, f"{before.model_name_or_path} answers")
        drawn = dataclasses.replace(sampling, seed=derived_seed(sampling.seed, number))
        self._sample(before, self.recipe.asked, drawn, folder / "responses")
        self._announce(number, f"{settings.annotator} scores the answers")
        scored = AnnotateArguments(folder / "responses", settings.annotator, self.options, yes=_AGREED)
        annotate(scored, folder / "annotated")
        free_memory()
        self._announce(number, "answers become pairs")
        pair_annotated(folder / "annotated", self.recipe.pairs, folder / "pairs")

    def _meet_start(self, number: int, folder: Path) -> None:
        """The new model's answers to the held-out prompts against the start's."""
        self._announce(number, "the new model answers the held-out prompts and meets the start")
        self._sample(self._sampled(number), self.recipe.held_out, self.recipe.held_out_sampling, folder / "answers")
        sides = str(folder / "answers"), str(self.folder / START)
        sampled = SampledWith(None, "train", self.recipe.held_out_sampling, rendering=self.recipe.held_out.rendering)
        compared = CompareArguments(*sides, sampled, self.recipe.judges, self.options, yes=_AGREED)
        compare(compared, folder / "comparison")
        free_memory()

    def _stages(self, number: int, folder: Path) -> dict[str, Stage]:
        """What each stage was made from."""
        settings = self.recipe.settings
        last = self.model(number - 1) if number > 1 else self.recipe.model.model_name_or_path
        inputs: dict[str, dict[str, str | Path]] = {
            "responses": {"model": last, "prompts": settings.prompts},
            "annotated": {"responses": folder / "responses", "annotator": settings.annotator},
            "pairs": {"annotated": folder / "annotated"},
            "model": {"model": last, "pairs": folder / "pairs"},
            "answers": {"model": folder / "model", "prompts": settings.eval_prompts},
            "comparison": {"answers": folder / "answers", "start": self.folder / START},
        }
        return {name: Stage(folder / name, given) for name, given in inputs.items()}

    def _announce(self, number: int, what: str) -> None:
        self.log(f"round {number} of {self.recipe.settings.rounds}: {what}")

    def _arguments(self, number: int) -> ModelArguments:
        """A round's model as training takes it; the start before the first."""
        if number == 0:
            return self.recipe.model
        return dataclasses.replace(self.recipe.model, model_name_or_path=str(self.model(number)), model_revision="main")

    def _sampled(self, number: int) -> ModelArguments:
        """A round's model as it answers."""
        return as_it_is(self._arguments(number))

    def _sample(self, model: ModelArguments, asked: PromptArguments, drawn: SamplingSettings, folder: Path) -> None:
        sample_responses(model, asked, drawn, folder, engine=self.recipe.settings.engine)
        free_memory()

    def _train(self, number: int, pairs: Path) -> None:
        self._announce(number, "a model is trained on them")
        config = copy.deepcopy(self.recipe.config)
        config.output_dir = str(self.model(number))
        data = DataArguments(dataset_name=str(pairs), chat_template=self.recipe.settings.chat_template)
        run_training(PREFERENCES, TrainingJob(self._arguments(number - 1), data, config))
        free_memory()

    def _drift(self, answers: Path) -> Metric:
        found = drift(answers / RESPONSES, self._sampled(0), self.recipe.held_out)
        return Metric.of("kl", found)


def _rows(folder: Path) -> Metric:
    found = next(metric for metric in read_results(folder / RESULTS).metrics if metric.name == "pair/rows")
    return dataclasses.replace(found, name="rows")


def _compared(folder: Path) -> list[Metric]:
    """What the judges said, and how long answers are; the start's figures are the stage ``before``."""
    wanted = ("win_rate/", "agreement/", "kappa/", "response_tokens", "end_of_turn_rate")
    return [metric for metric in read_results(folder / RESULTS).metrics if metric.name.startswith(wanted)]
