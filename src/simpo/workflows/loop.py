"""``simpo loop``: rounds of on-policy training, each starting from the previous model, with optional early stopping."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console

from simpo.client import Estimate, confirm_cost
from simpo.config import required, setting
from simpo.data.prompts import Prompt, prepare_prompts, read_prompts
from simpo.data.sources import load_rows
from simpo.errors import SimpoError, third_party
from simpo.evaluation.answers import Answerer
from simpo.evaluation.compare import CompareSettings, compare, make_judges
from simpo.generation.sample import FILE_NAME as RESPONSES
from simpo.generation.sample import Job, PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.generation.vllm import load_vllm
from simpo.judging.annotate import annotate
from simpo.judging.protocol import Answers, Pair
from simpo.judging.registry import check_judges_new_answers, make_annotator
from simpo.judging.settings import AnnotatorSettings, JudgeOptions, JudgeSettings
from simpo.models.checkpoint import Checkpoint, model_digest
from simpo.models.devices import free_memory
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.packing.layout import TokenizedComparison
from simpo.packing.scoring import score_responses
from simpo.runs.files import read_lines
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import FILE_NAME, Metric, make_table, print_full_width, read_results, write_results
from simpo.runs.terminal import interruptible
from simpo.statistics import Interval, mean_interval
from simpo.training.callbacks import track_part
from simpo.training.preference import PreferenceTrainer
from simpo.training.run import TrainingJob, run_training
from simpo.training.settings import (
    IMPOSSIBLE,
    DataArguments,
    check_optimizer,
    checkpoint_from_recipe,
    settings_identity,
    settings_of,
)
from simpo.workflows.pair import FILE_NAME as PAIRS
from simpo.workflows.pair import PairSettings, make_pairs, pair_annotated

_WIN_RATE = "win_rate/"
_NOT_IN_TABLE = ("agreement/", "kappa/")
_TRIAL_PROMPTS = 2  # for the check of all stages; objectives that need mismatched answers require two
# Keys that are not part of a loop's identity: they do not change results, or only the number of rounds.
_NOT_IN_IDENTITY = ("yes", "judge_url", "judge_key_env", "rounds")

# ---- The recipe: prompts, annotator, judges, and when to stop.


@dataclass(frozen=True, kw_only=True)
class LoopSettings(AnnotatorSettings):
    """Prompts, judges and stopping."""

    prompts: str = required("File, folder or hub id of the training prompts, which are answered in every round.")
    eval_prompts: str = required(
        "File, folder or hub id of the held-out prompts on which each round is compared with the initial model."
    )
    judges: list[str] | None = setting(
        None, "Judges that compare each round with the initial model (default: the annotator, or each of several)."
    )
    rounds: int = setting(3, "Number of rounds of sampling, annotating, pairing and training.", least=1)
    prompts_split: str = setting("train", "Split of prompts.")
    eval_prompts_split: str = setting("train", "Split of eval_prompts.")
    eval_n: int = setting(1, "Answers per model and held-out prompt.", least=1)
    engine: Literal["transformers", "vllm"] = setting("transformers", "Engine that generates the answers.")
    chat_template: str | None = setting(
        None, "Chat template, a file with one, or none for raw text (default: the tokenizer's own)."
    )
    stop_win_rate: float | None = setting(
        None, "Stop after a round whose win rate (first judge) is below this, from 0 to 1.", least=0, most=1
    )
    stop_kl: float | None = setting(
        None, "Stop after a round whose KL from the initial model exceeds this, in nats per answer.", above=0
    )
    yes: bool = setting(False, "Send requests to the server without asking for confirmation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judges is not None and not self.judges:
            raise SimpoError("judges: is empty; name at least one, or leave the key out to use the annotator")

    @property
    def annotators_and_judges(self) -> list[str]:
        """Names of all annotators and judges, any of which may use the server."""
        return [*self.annotators, *(self.judges or ())]


@dataclass(frozen=True)
class LoopRecipe:
    """All settings of a loop. ``config`` configures preference training; its output folder is the loop's."""

    settings: LoopSettings
    sampling: SamplingSettings
    pairs: PairSettings
    model: ModelArguments
    config: Any

    def __post_init__(self) -> None:
        if self.sampling.n < 2:
            raise SimpoError(f"n: {self.sampling.n} answer per prompt cannot be paired; set n to 2 or more")
        if self.settings.engine == "vllm" and self.model.use_peft:
            raise SimpoError("engine: vllm does not support adapters; use transformers or use_peft: false")
        if checkpoint_from_recipe(self.config) is not None:
            raise SimpoError("resume_from_checkpoint: each round starts from the previous round's model; leave it out")

    @property
    def training_prompts(self) -> PromptArguments:
        """Prompts whose answers are trained on."""
        return self._prompts(self.settings.prompts, self.settings.prompts_split)

    @property
    def held_out_prompts(self) -> PromptArguments:
        """Prompts on which each round's model is compared with the initial model."""
        return self._prompts(self.settings.eval_prompts, self.settings.eval_prompts_split)

    def _prompts(self, name: str, split: str) -> PromptArguments:
        rendering = self.config.tokenize_settings.rendering
        return PromptArguments(name, split, self.settings.chat_template, rendering=rendering)

    @property
    def held_out_sampling(self) -> SamplingSettings:
        """Sampling settings for held-out prompts, equal for all models; no round trains with this seed."""
        return replace(self.sampling, n=self.settings.eval_n, seed=derived_seed(self.sampling.seed, 0))

    @property
    def judges(self) -> list[str]:
        """Names of the judges that compare a round's model with the initial model."""
        return self.settings.judges or self.settings.annotators

    def start(self) -> ModelArguments:
        """Return the initial model's arguments without the adapter that training would add."""
        return without_adapter(self.model)


def without_adapter(model: ModelArguments) -> ModelArguments:
    """Return the arguments for loading a model as stored, without a new adapter."""
    return ModelArguments(
        model.model_name_or_path,
        model.model_revision,
        model.dtype,
        model.attn_implementation,
        model.trust_remote_code,
        model.allow_pickle,
    )


# ---- One round.

_START = "start-answers"
_BATCH_TOKENS = 16384
_CONFIRMED = True  # the user confirmed the cost of all requests before the first round
_COMPARISON_METRICS = ("win_rate/", "agreement/", "kappa/", "response_tokens", "end_of_turn_rate")


def kl_from_start(answers: Path, start: ModelArguments, prompts: PromptArguments) -> Interval:
    """Return the mean of ``log pi(y | x) - log pi_start(y | x)`` over answers ``y`` from ``pi``, in nats.

    The interval is over prompts. With temperature 1 and no truncation, this is an unbiased estimate of
    KL(pi || pi_start); with other sampling settings, it is a similar measure for the distribution sampled from.
    ``answers`` is the trained model's ``responses.jsonl``, with token ids and log-probabilities.
    """
    records = read_lines(answers)
    tokenizer = load_tokenizer(start, chat_template=prompts.chat_template)
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
    """Runs the rounds of a loop; holds what they share."""

    folder: Path
    recipe: LoopRecipe
    options: JudgeOptions
    fingerprint: str
    log: Log

    def model_folder(self, number: int) -> Path:
        """Return the folder of a round's model."""
        return self.folder / f"round-{number}" / "model"

    def sample_start_answers(self) -> None:
        """Sample the initial model's answers to the held-out prompts."""
        self.log("sampling the initial model's answers to the held-out prompts")
        self._sample(0, self.recipe.held_out_prompts, self.recipe.held_out_sampling, self.folder / _START)

    def run(self, number: int) -> list[Metric]:
        """Run all stages of a round and return its metrics. Each is a run of its own, so a killed loop resumes."""
        folder = self.folder / f"round-{number}"
        recipe, settings, previous = self.recipe, self.recipe.settings, self._model(number - 1)

        self._announce(number, f"sampling answers from {previous.model_name_or_path}")
        drawn = replace(recipe.sampling, seed=derived_seed(recipe.sampling.seed, number))
        self._sample(number - 1, recipe.training_prompts, drawn, folder / "responses")

        self._announce(number, f"scoring the answers with {', '.join(settings.annotators)}")
        annotate(
            folder / "responses",
            settings.annotator,
            self.options,
            folder / "annotated",
            normalization=settings.annotator_normalization,
            yes=_CONFIRMED,
        )
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
        return metrics

    def _compare(self, number: int, folder: Path) -> list[Metric]:
        """Compare the round's model with the initial model on the held-out prompts, and return the round's metrics."""
        recipe = self.recipe
        self._announce(number, "comparing the new model with the initial model on the held-out prompts")
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
        pairs, compared = (read_results(folder / stage / FILE_NAME).metrics for stage in ("pairs", "comparison"))
        return [
            *(replace(metric, name="rows") for metric in pairs if metric.name == "pair/rows"),
            *(metric for metric in compared if metric.name.startswith(_COMPARISON_METRICS)),
            Metric.of("kl", kl),
        ]

    def _announce(self, number: int, stage: str) -> None:
        self.log(f"round {number} of {self.recipe.settings.rounds}: {stage}")

    def _model(self, number: int) -> ModelArguments:
        """Return the training arguments for a round's model; round 0 is the initial model."""
        if number == 0:
            return self.recipe.model
        name = str(self.model_folder(number))
        return replace(self.recipe.model, model_name_or_path=name, model_revision="main")

    def _sample(self, number: int, prompts: PromptArguments, settings: SamplingSettings, folder: Path) -> None:
        model = without_adapter(self._model(number))
        sample_responses(model, prompts, settings, folder, engine=self.recipe.settings.engine)
        free_memory()


# ---- The workflow.


def run_loop(recipe: LoopRecipe, *, argv: Sequence[str] = (), file: Path | None = None) -> Path:
    """Run the remaining rounds. The same call resumes a killed loop and leaves a finished one unchanged.

    A larger ``rounds`` extends a finished loop as if it had been set from the start, unless a stop criterion ended that
    loop. A new loop first checks the settings of all stages and asks the user to confirm the cost of judge requests.
    Returns the model folder of the last round that passed all stop criteria, or the initial model's name if none did.

    Raises:
        SimpoError: the input is invalid or a stage failed.
        InterruptedRun: a signal arrived; finished work is kept.
    """
    folder, settings = Path(recipe.config.output_dir), recipe.settings
    with interruptible(), RunFolder(folder, command="loop") as run:
        options = _judge_options(recipe)
        identity = _identity(recipe, options)
        begun = sum(1 for path in folder.glob("round-*") if path.is_dir())
        if begun > settings.rounds:
            raise SimpoError(
                f"rounds: {folder} already has {begun}, more than the {settings.rounds} requested; set rounds to "
                f"{begun} or name a new folder"
            )
        if run.finished:
            done, last_passed = _outcome(folder)
            if done == last_passed < settings.rounds:
                run.reopen()
            elif last_passed < done:
                run.log(f"a stop criterion ended this loop after round {done}")
        elif not run.resuming:
            _check_stages(recipe, options, run.log)
        if not run.finished:
            done = sum(1 for _ in folder.glob(f"round-*/{FILE_NAME}"))
            _confirm_cost(recipe, options, settings.rounds - done, run.log)
        resolved = settings_of(*(getattr(recipe, part.name) for part in dataclasses.fields(recipe)))
        run.begin(identity, argv=argv, recipe=file, resolved=resolved)
        rounds = Rounds(folder, recipe, options, run.fingerprint, run.log)
        run.complete(lambda: _run_rounds(rounds))
    _, last_passed = _outcome(folder)
    return rounds.model_folder(last_passed) if last_passed else Path(recipe.model.model_name_or_path)


def _outcome(folder: Path) -> tuple[int, int]:
    """Return the number of rounds of a finished loop, and the last one that passed all stop criteria."""
    values = {metric.name: metric.value for metric in read_results(folder / FILE_NAME).metrics}
    return int(values["rounds"] or 0), int(values["last_good_round"] or 0)


def _judge_options(recipe: LoopRecipe) -> JudgeOptions:
    return JudgeOptions.during_training(recipe.model, recipe.settings.client())


def _prompt_rows(recipe: LoopRecipe) -> dict[str, Dataset]:
    """Load the rows of training and held-out prompts, by their keys."""
    settings = recipe.settings
    return {
        key: load_rows(getattr(settings, key), split=getattr(settings, f"{key}_split"))
        for key in ("prompts", "eval_prompts")
    }


def _identity(recipe: LoopRecipe, options: JudgeOptions) -> Mapping[str, Any]:
    """Return everything that determines the result; fails if any of it is missing."""
    settings = recipe.settings
    annotator = make_annotator(settings.annotator, options, settings.annotator_normalization)
    for name in settings.judges or ():
        check_judges_new_answers(name)
    judges = make_judges(recipe.judges, options)
    parts = (settings, recipe.sampling, recipe.pairs)
    own = {key: value for part in parts for key, value in vars(part).items() if key not in _NOT_IN_IDENTITY}
    return {
        **settings_identity(recipe.config),
        **own,
        **{key: rows._fingerprint for key, rows in _prompt_rows(recipe).items()},
        **{f"annotator/{key}": value for key, value in annotator.identity.items()},
        **{f"judge {name}/{key}": value for name, judge in judges.items() for key, value in judge.identity.items()},
        "model": model_digest(recipe.model),
        "dtype": recipe.model.dtype,
        **{key: str(value) for key, value in recipe.model.quantization.items()},
        **({} if recipe.model.save_dtype is None else {"save_dtype": recipe.model.save_dtype}),
        "lora": str(recipe.model.lora if recipe.model.use_peft else None),
    }


# ---- Before the first round.


def _check_stages(recipe: LoopRecipe, options: JudgeOptions, log: Log) -> None:
    """Find mistakes in the settings of later stages now instead of after hours of sampling.

    Reads and renders the prompts, lets annotators and judges compare made-up answers (without sending requests to a
    server, although its key must exist), and builds a trainer without running a step.
    """
    log("checking the settings of all stages")
    if recipe.settings.engine == "vllm":
        load_vllm(recipe.start())
    if options.client is not None:
        options.client.endpoint.api_key()
    quiet = replace(options, log=lambda line: None)
    prompts: list[list[Prompt]] = []
    for source, sampling, judges in (
        (recipe.training_prompts, recipe.sampling, recipe.settings.annotators),
        (recipe.held_out_prompts, recipe.held_out_sampling, recipe.judges),
    ):
        job = Job.prepare(recipe.start(), source, sampling, recipe.settings.engine, lambda line: None)
        prompts.append(sorted(job.prompts, key=lambda prompt: len(prompt.ids)))
        pairs = [Pair.for_prompt(one, ("Answer 0.", "Answer 1.")) for one in prompts[-1]]
        for judge in make_judges([name for name in judges if name != "api"], quiet).values():
            judge.check(pairs)
            judge.compare(pairs[:_TRIAL_PROMPTS])
    free_memory()

    n = recipe.sampling.n
    answers = {"responses": [f"Answer {number}." for number in range(n)], "scores": [*range(n)]}
    trial = prompts[0][:_TRIAL_PROMPTS]
    records = [{"id": one.id, "prompt": one.content, **one.context.columns, **answers} for one in trial]
    rows, _ = make_pairs(records, replace(recipe.pairs, min_gap=0.0, max_length_ratio=None))
    config = copy.deepcopy(recipe.config)
    config.report_to, config.load_best_model_at_end = [], False
    config.eval_strategy = type(config.eval_strategy)("no")
    with TemporaryDirectory() as folder, third_party(IMPOSSIBLE):
        config.output_dir = folder
        trainer = PreferenceTrainer(
            PreferenceTrainer.load(recipe.model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(recipe.model, chat_template=recipe.settings.chat_template),
        )
        check_optimizer(trainer)
    del trainer
    free_memory()


def _confirm_cost(recipe: LoopRecipe, options: JudgeOptions, rounds: int, log: Log) -> None:
    """Ask the user once to confirm the cost of all rounds' requests, estimated with answers of maximum length."""
    annotator = make_annotator(recipe.settings.annotator, options, recipe.settings.annotator_normalization)
    answerer = Answerer(recipe.start(), recipe.sampling)
    training, held_out = (read_prompts(rows)[0] for rows in _prompt_rows(recipe).values())
    if shared := len({prompt.id for prompt in training} & {prompt.id for prompt in held_out}):
        log(f"note: {shared:,} of {len(held_out):,} eval_prompts are also training prompts")
    answers = [answerer.placeholder_answer(f"a{k}") for k in range(recipe.sampling.n)]
    estimate = annotator.estimate([Answers.for_prompt(prompt, answers) for prompt in training])
    a, b = ([answerer.placeholder_answer(f"{side}{k}") for k in range(recipe.settings.eval_n)] for side in "ab")
    pairs = [Pair.for_prompt(prompt, two) for prompt in held_out for two in product(a, b)]
    estimates = [estimate, *(judge.estimate(pairs) for judge in make_judges(recipe.judges, options).values())]
    confirm_cost(sum(estimates, Estimate()) * rounds, yes=recipe.settings.yes, log=log)


# ---- The rounds, and their summary.


def _run_rounds(rounds: Rounds) -> list[Metric]:
    """Run the remaining rounds and return the metrics of the loop."""
    settings = rounds.recipe.settings
    by_round: dict[int, list[Metric]] = {}
    rounds.sample_start_answers()
    last_passed = 0
    for number in range(1, settings.rounds + 1):
        results = rounds.folder / f"round-{number}" / FILE_NAME  # written at the end of a round
        by_round[number] = read_results(results).metrics if results.exists() else rounds.run(number)
        rate = next(metric for metric in by_round[number] if metric.name.startswith(_WIN_RATE))  # by the first judge
        kl = next(metric for metric in by_round[number] if metric.name == "kl")
        rate_text, kl_text = ("unknown" if one.value is None else f"{one.value:.3g}" for one in (rate, kl))
        rounds.log(f"round {number}: {rate.name} {rate_text}, KL {kl_text}")
        reason = None
        if settings.stop_win_rate is not None and rate.value is not None and rate.value < settings.stop_win_rate:
            reason = f"{rate.name} {rate_text} is below stop_win_rate {settings.stop_win_rate:g}"
        elif settings.stop_kl is not None and kl.value is not None and kl.value > settings.stop_kl:
            reason = f"KL {kl_text} is above stop_kl {settings.stop_kl:g}"
        if reason is not None:
            rounds.log(f"stopped after round {number}: {reason}")
            break
        last_passed = number
    metrics = [Metric("rounds", len(by_round)), Metric("last_good_round", last_passed)]
    for number, round_metrics in by_round.items():
        metrics += [replace(metric, name=f"round-{number}/{metric.name}") for metric in round_metrics]
    return metrics


def print_loop(folder: Path) -> None:
    """Print the table of a finished loop, with one row per round."""
    rows: dict[str, dict[str, Metric]] = {}
    for metric in read_results(folder / FILE_NAME).metrics:
        number, slash, name = metric.name.partition("/")
        if slash and metric.stage != "before" and not name.startswith(_NOT_IN_TABLE):
            rows.setdefault(number.removeprefix("round-"), {})[name] = metric
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    lines = [
        [number, *(metrics[name].text if name in metrics else "" for name in columns)]
        for number, metrics in rows.items()
    ]
    title = "simpo loop: each round compared with the initial model"
    print_full_width(Console(), make_table(["round", *columns], lines, names=0, title=title))
