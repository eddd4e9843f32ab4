"""Rounds of on-policy training: their recipe, and one round, from sampling to the comparison with the start."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from simpo.config import check_values, required, setting, setting_of
from simpo.data.prompts import prepare_prompts
from simpo.errors import SimpoError
from simpo.evaluation.compare import CompareSettings, compare
from simpo.generation.sample import FILE_NAME as RESPONSES
from simpo.generation.sample import PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.judging.annotate import AnnotateArguments, annotate
from simpo.judging.settings import (
    Annotator,
    AnnotatorArguments,
    JudgeOptions,
    JudgeSettings,
    Normalization,
    annotator_names,
)
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
from simpo.training.identity import checkpoint_from_recipe
from simpo.training.preference import PreferenceTrainer
from simpo.training.run import TrainingJob, run_training
from simpo.training.settings import DataArguments
from simpo.training.trackers import track_part
from simpo.workflows.pair import FILE_NAME as PAIRS
from simpo.workflows.pair import PairSettings, pair_annotated

# ---- The recipe: prompts, annotator, judges, and when to stop.


@dataclass
class LoopSettings:
    """Keys of ``simpo loop`` that no other command has."""

    prompts: str = required("File, folder or hub id of the prompts that are answered in every round.")
    eval_prompts: str = required(
        "File, folder or hub id of held-out prompts, on which every round is compared with the start."
    )
    annotator: Annotator = setting_of(AnnotatorArguments, "annotator")
    judges: list[str] | None = setting(
        None, "Annotators that decide whether a round is better than the start (default: annotator; of several, each)."
    )
    annotator_normalization: Normalization | None = setting_of(AnnotatorArguments, "annotator_normalization")
    rounds: int = setting(3, "How many times to sample, annotate, pair and train.", least=1)
    prompts_split: str = setting("train", "Split of prompts.")
    eval_prompts_split: str = setting("train", "Split of eval_prompts.")
    eval_n: int = setting(1, "Answers of each model to every held-out prompt.", least=1)
    engine: Literal["transformers", "vllm"] = setting("transformers", "The library that generates the answers.")
    chat_template: str | None = setting(
        None, "Template, file with one, or none for raw text (default: the tokenizer's own)."
    )
    stop_win_rate: float | None = setting(
        None, "Stop after a round whose win rate by the first judge is below this share.", least=0, most=1
    )
    stop_kl: float | None = setting(
        None, "Stop after a round whose KL from the start is above this, in nats per answer.", above=0
    )
    judge_url: str | None = setting(None, "Server of the annotator or judge 'api'.")
    judge_model: str | None = setting(None, "Its model's name on that server.")
    judge_key_env: str = setting("OPENAI_API_KEY", "Environment variable with its key.")
    yes: bool = setting(False, "Send requests to the server without asking.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.judges is not None and not self.judges:
            raise SimpoError("judges: name one, or leave the key out to use the annotator")
        needs_server = "api" in (*self.annotators, *(self.judges or ()))
        if needs_server and None in (self.judge_url, self.judge_model):
            raise SimpoError("judge_url and judge_model: the annotator or judge 'api' needs both")
        if not needs_server and (self.judge_url, self.judge_model) != (None, None):
            raise SimpoError("judge_url and judge_model: only the annotator or judge 'api' uses them; leave them out")

    @property
    def annotators(self) -> list[str]:
        """The name of the annotator, or of each one that is combined."""
        return annotator_names(self.annotator, self.annotator_normalization)


@dataclass(frozen=True)
class LoopRecipe:
    """All parts of the recipe; ``config`` is that of preference training, and its output folder is the loop's."""

    settings: LoopSettings
    sampling: SamplingSettings
    pairs: PairSettings
    model: ModelArguments
    config: Any

    def __post_init__(self) -> None:
        if self.sampling.n < 2:
            raise SimpoError(f"n: {self.sampling.n} answer to a prompt cannot be compared; set n to 2 or more")
        if self.settings.engine == "vllm" and self.model.use_peft:
            raise SimpoError("engine: vllm samples from whole models, no adapters; use transformers or use_peft: false")
        if checkpoint_from_recipe(self.config) is not None:
            raise SimpoError("resume_from_checkpoint: every round starts from the previous round's model; leave it out")

    @property
    def training_prompts(self) -> PromptArguments:
        """The prompts whose answers are trained on."""
        return self._prompts(self.settings.prompts, self.settings.prompts_split)

    @property
    def held_out_prompts(self) -> PromptArguments:
        """The prompts on which every round's model is compared with the start."""
        return self._prompts(self.settings.eval_prompts, self.settings.eval_prompts_split)

    def _prompts(self, name: str, split: str) -> PromptArguments:
        rendering = self.config.tokenize_settings.rendering
        return PromptArguments(name, split, self.settings.chat_template, rendering=rendering)

    @property
    def held_out_sampling(self) -> SamplingSettings:
        """The same for every model, with a seed that no round uses for training prompts."""
        return replace(self.sampling, n=self.settings.eval_n, seed=derived_seed(self.sampling.seed, 0))

    @property
    def judges(self) -> list[str]:
        """Names of the judges that compare a round with the start."""
        return self.settings.judges or self.settings.annotators

    def start(self) -> ModelArguments:
        """The start model without the adapter that training would add."""
        return without_adapter(self.model)


def without_adapter(model: ModelArguments) -> ModelArguments:
    """The arguments for loading a model as it is stored, without a new adapter."""
    return ModelArguments(
        model.model_name_or_path,
        model.model_revision,
        model.dtype,
        model.attn_implementation,
        model.trust_remote_code,
        model.allow_pickle,
    )


# ---- One round.

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
