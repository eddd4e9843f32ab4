"""One round of on-policy training: sample, score, pair, train, and compare the model with the start."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simpo.data.prompts import prepare_prompts
from simpo.evaluation.compare import CompareSettings, compare
from simpo.generation.sample import FILE_NAME as RESPONSES
from simpo.generation.sample import PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.judging.annotate import AnnotateArguments, annotate
from simpo.judging.settings import Annotator, JudgeOptions, JudgeSettings
from simpo.models.checkpoint import Checkpoint
from simpo.models.devices import free_memory
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.packing.layout import TokenizedComparison
from simpo.packing.scoring import score_responses
from simpo.runs.atomic import write_text
from simpo.runs.lines import read_lines
from simpo.runs.log import Log
from simpo.runs.manifest import read_manifest
from simpo.runs.results import FILE_NAME as RESULTS
from simpo.runs.results import Metric, read_results, write_results
from simpo.statistics import Interval, mean_interval
from simpo.training.preference import PreferenceTrainer
from simpo.training.run import TrainingJob, run_training
from simpo.training.settings import DataArguments
from simpo.training.trackers import track_part
from simpo.workflows.loop_settings import LoopRecipe, without_adapter
from simpo.workflows.pair import FILE_NAME as PAIRS
from simpo.workflows.pair import pair_annotated

ROUND_FILE = "round.json"
_SCHEMA = 1
_START = "start-answers"
_BATCH_TOKENS = 16384
_CONFIRMED = True  # the cost of a judge's requests was confirmed before the first round

# The products of a stage; other files in its folder (logs, times, the machine) differ between identical runs.
_PRODUCTS = ("responses.jsonl", "annotated.jsonl", "pairs.jsonl", "verdicts.jsonl", "*.safetensors")
_COMPARED = ("win_rate/", "agreement/", "kappa/", "response_tokens", "end_of_turn_rate")


def kl_from_start(answers: Path, start: ModelArguments, prompts: PromptArguments) -> Interval:
    """Mean of ``log pi(y | x) - log pi_start(y | x)`` over answers ``y`` of ``pi``, in nats; interval over prompts.

    This is an unbiased estimate of KL(pi || pi_start) if the answers are drawn at temperature 1 from the whole
    distribution. With other settings it is a similar measure for the distribution that is sampled. ``answers`` is
    ``responses.jsonl`` of the trained model, with token ids and log-probabilities, and ``start`` the model that the
    distance is measured from.
    """
    records = read_lines(answers)
    tokenizer = load_tokenizer(start.model_name_or_path, start, chat_template=prompts.chat_template)
    prepared = prepare_prompts(prompts.rows(), tokenizer, rendering=prompts.rendering)
    prompt_ids = {prompt.id: prompt.ids for prompt in prepared}
    comparisons = [TokenizedComparison(prompt_ids[record["id"]], record["response_ids"]) for record in records]
    longest = max(max(one.packed_length, one.padded_length) for one in comparisons)
    model = Checkpoint.read(start).load().eval()
    with torch.no_grad():
        logps = score_responses(model, comparisons, max_batch_tokens=max(_BATCH_TOKENS, longest)).logp.tolist()
    start_logps = iter(logps)
    ratios = [np.mean([logp - next(start_logps) for logp in record["logps"]]) for record in records]
    return mean_interval(np.array(ratios))


@dataclass(frozen=True)
class Rounds:
    """The settings that all rounds of a loop share: folder, recipe, judge options and fingerprint."""

    folder: Path
    recipe: LoopRecipe
    options: JudgeOptions
    fingerprint: str
    log: Log

    def model_folder(self, number: int) -> Path:
        """Folder of a round's model."""
        return self.folder / f"round-{number}" / "model"

    def sample_start_answers(self) -> None:
        """Sample the start model's answers to the held-out prompts."""
        self.log("sampling the start model's answers to the held-out prompts")
        self._sample(0, self.recipe.held_out_prompts, self.recipe.held_out_sampling, self.folder / _START)

    def run(self, number: int) -> list[Metric]:
        """All stages of a round; each is its own run, so that a loop that was killed continues where it was."""
        folder = self.folder / f"round-{number}"
        recipe, settings, previous = self.recipe, self.recipe.settings, self._model(number - 1)

        self._announce(number, f"sampling answers from {previous.model_name_or_path}")
        drawn = dataclasses.replace(recipe.sampling, seed=derived_seed(recipe.sampling.seed, number))
        self._sample(number - 1, recipe.training_prompts, drawn, folder / "responses")

        self._announce(number, f"scoring the answers with {', '.join(settings.annotators)}")
        how = settings.annotator_normalization
        scored = AnnotateArguments(folder / "responses", settings.annotator, self.options, how, yes=_CONFIRMED)
        annotate(scored, folder / "annotated")
        free_memory()

        self._announce(number, "pairing the answers")
        pair_annotated(folder / "annotated", recipe.pairs, folder / "pairs")

        self._announce(number, "training a model on the pairs")
        config = copy.deepcopy(recipe.config)
        config.output_dir = str(self.model_folder(number))
        data = DataArguments(dataset_name=str(folder / "pairs" / PAIRS), chat_template=settings.chat_template)
        with track_part(f"{self.folder.name}-{folder.name}", folder) as trackers:
            run_training(PreferenceTrainer, TrainingJob(previous, data, config, callbacks=[trackers]))
            free_memory()
            metrics = self._compare(number, folder)
            write_results(folder, command="loop", fingerprint=self.fingerprint, metrics=metrics)
        self._write_record(number, folder)
        return metrics

    def _compare(self, number: int, folder: Path) -> list[Metric]:
        """Let the round's new model answer the held-out prompts; the metrics of the round."""
        recipe = self.recipe
        self._announce(number, "comparing the new model with the start on the held-out prompts")
        self._sample(number, recipe.held_out_prompts, recipe.held_out_sampling, folder / "answers")
        comparison = CompareSettings(
            a=str(folder / "answers"),
            b=str(self.folder / _START),
            output_dir=folder / "comparison",
            judge=recipe.judges,
            sampling=recipe.held_out_sampling,
            judging=JudgeSettings(yes=_CONFIRMED),
        )
        compare(comparison, options=self.options)
        free_memory()

        kl = kl_from_start(folder / "answers" / RESPONSES, recipe.start(), recipe.held_out_prompts)
        free_memory()
        return [
            *(
                dataclasses.replace(metric, name="rows")
                for metric in read_results(folder / "pairs" / RESULTS).metrics
                if metric.name == "pair/rows"
            ),
            *(m for m in read_results(folder / "comparison" / RESULTS).metrics if m.name.startswith(_COMPARED)),
            Metric.of("kl", kl),
        ]

    def _announce(self, number: int, what: str) -> None:
        self.log(f"round {number} of {self.recipe.settings.rounds}: {what}")

    def _model(self, number: int) -> ModelArguments:
        """A round's model as training takes it; 0 is the start."""
        if number == 0:
            return self.recipe.model
        name = str(self.model_folder(number))
        return dataclasses.replace(self.recipe.model, model_name_or_path=name, model_revision="main")

    def _sample(self, number: int, prompts: PromptArguments, settings: SamplingSettings, folder: Path) -> None:
        model = without_adapter(self._model(number))
        sample_responses(model, prompts, settings, folder, engine=self.recipe.settings.engine)
        free_memory()

    def _write_record(self, number: int, folder: Path) -> None:
        """Write ``round.json``, last of all: what each stage made and from what, without times and machines.

        Paths are relative to the loop's folder, so that two loops with the same seed have the same file.
        """
        settings = self.recipe.settings
        previous = self.model_folder(number - 1) if number > 1 else self.recipe.model.model_name_or_path
        inputs: dict[str, dict[str, Annotator | Path]] = {
            "responses": {"model": previous, "prompts": settings.prompts},
            "annotated": {"responses": folder / "responses", "annotator": settings.annotator},
            "pairs": {"annotated": folder / "annotated"},
            "model": {"model": previous, "pairs": folder / "pairs"},
            "answers": {"model": folder / "model", "prompts": settings.eval_prompts},
            "comparison": {"answers": folder / "answers", "start": self.folder / _START},
        }
        stages = {name: self._describe(folder / name, sources) for name, sources in inputs.items()}
        document = {"schema": _SCHEMA, "round": number, "stages": stages}
        write_text(folder / ROUND_FILE, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def _describe(self, stage: Path, inputs: dict[str, Annotator | Path]) -> dict[str, Any]:
        def relative(name: Annotator | Path) -> Annotator:
            return name.relative_to(self.folder).as_posix() if isinstance(name, Path) else name

        results = read_results(stage / RESULTS)
        return {
            "folder": relative(stage),
            "command": results.command,
            "fingerprint": results.fingerprint,
            "from": {name: relative(given) for name, given in inputs.items()},
            "files": [
                {"path": name, "bytes": size, "sha256": digest}
                for name, size, digest in read_manifest(stage)
                if any(fnmatch(name, pattern) for pattern in _PRODUCTS)
            ],
            "figures": {"/".join(filter(None, (one.name, one.stage))): one.value for one in results.metrics},
        }
