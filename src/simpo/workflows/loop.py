"""``simpo loop``: rounds of on-policy training, each from the previous model, until all are done or one fails."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from rich.console import Console

from simpo.analysis.plots import plot_rounds
from simpo.client import Estimate, confirm_cost
from simpo.data.prompts import read_prompts
from simpo.data.sources import load_rows
from simpo.errors import SimpoError, third_party
from simpo.evaluation.answers import Answerer
from simpo.evaluation.compare import make_judges
from simpo.generation.engine import load_vllm
from simpo.generation.sample import Job
from simpo.judging.protocol import Answers, Pair
from simpo.judging.registry import check_judges_anew, make_annotator
from simpo.judging.settings import JudgeOptions, server_client
from simpo.models.checkpoint import model_digest
from simpo.models.devices import free_memory
from simpo.models.loading import load_tokenizer
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import FILE_NAME, Metric, print_full_width, read_results, table_of
from simpo.runs.signals import interruptible
from simpo.statistics import Interval
from simpo.training.identity import settings_identity, settings_of
from simpo.training.preference import PreferenceTrainer
from simpo.training.settings import IMPOSSIBLE, check_optimizer
from simpo.workflows.pair import make_pairs
from simpo.workflows.rounds import ROUND_FILE, LoopRecipe, Rounds

PLOT = "rounds.png"
_WIN_RATE = "win_rate/"
_NOT_IN_TABLE = ("agreement/", "kappa/")
_TRIED = 2  # prompts: objectives that need mismatched answers take two
# Keys that do not change what is computed, or only how many rounds.
_NO_INFLUENCE = ("yes", "judge_url", "judge_key_env", "rounds")


def run_loop(recipe: LoopRecipe, *, argv: Sequence[str] = (), file: Path | None = None) -> Path:
    """Run the rounds that are left; the same call continues a loop that was killed and leaves a finished one as it is.

    With more ``rounds`` it continues a finished loop, unless that one was stopped, as if they had been requested at
    once. Before a new loop begins, the settings of all stages are checked and the cost of a judge's requests is
    confirmed. Returns the folder of the model of the last round that passed all stop criteria, or the start's name if
    there is none.

    Raises:
        SimpoError: something that the user gave cannot be used, or a stage failed.
        InterruptedRun: a signal came; what was done is kept.
    """
    folder, settings = Path(recipe.config.output_dir), recipe.settings
    with interruptible(), RunFolder(folder, command="loop") as run:
        options = _judge_options(recipe)
        identity = _identity(recipe, options)
        begun = sum(1 for path in folder.glob("round-*") if path.is_dir())
        if begun > settings.rounds:
            raise SimpoError(
                f"rounds: {folder} already has {begun}, more than the {settings.rounds} requested; give {begun}, or "
                "name a new folder"
            )
        if run.finished:
            done, last_good = _outcome(folder)
            if done == last_good < settings.rounds:
                run.reopen()
            elif last_good < done:
                run.log(f"this loop was stopped after round {done}")
        elif not run.resuming:
            _check_stages(recipe, options, run.log)
        if not run.finished:
            done = sum(1 for _ in folder.glob(f"round-*/{ROUND_FILE}"))
            _confirm_cost(recipe, options, settings.rounds - done, run.log)
        resolved = settings_of(*(getattr(recipe, part.name) for part in dataclasses.fields(recipe)))
        run.begin(identity, argv=argv, recipe=file, resolved=resolved)
        rounds = Rounds(folder, recipe, options, run.fingerprint, run.log)
        run.complete(lambda: _run_rounds(rounds))
    _, last_good = _outcome(folder)
    return rounds.model_folder(last_good) if last_good else Path(recipe.model.model_name_or_path)


def _outcome(folder: Path) -> tuple[int, int]:
    """The number of rounds of a finished loop, and the last one that passed all stop criteria."""
    found = {metric.name: metric.value for metric in read_results(folder / FILE_NAME).metrics}
    return int(found["rounds"] or 0), int(found["last_good_round"] or 0)


def _judge_options(recipe: LoopRecipe) -> JudgeOptions:
    settings = recipe.settings
    client = server_client(settings.judge_url, settings.judge_model, settings.judge_key_env)
    return JudgeOptions.during_training(recipe.model, client)


def _prompt_rows(recipe: LoopRecipe) -> dict[str, Dataset]:
    """The data sets of both kinds of prompts, by their keys."""
    settings = recipe.settings
    return {
        key: load_rows(getattr(settings, key), split=getattr(settings, f"{key}_split"))
        for key in ("prompts", "eval_prompts")
    }


def _identity(recipe: LoopRecipe, options: JudgeOptions) -> Mapping[str, Any]:
    """Everything that determines the result; fails if something that it depends on is missing."""
    settings = recipe.settings
    annotator = make_annotator(settings.annotator, options, settings.annotator_normalization)
    for name in settings.judges or ():
        check_judges_anew(name)
    judges = make_judges(recipe.judges, options)
    parts = (settings, recipe.sampling, recipe.pairs)
    chosen = {key: value for part in parts for key, value in vars(part).items() if key not in _NO_INFLUENCE}
    return {
        **settings_identity(recipe.config),
        **chosen,
        **{key: rows._fingerprint for key, rows in _prompt_rows(recipe).items()},
        **{f"annotator/{key}": value for key, value in annotator.identity.items()},
        **{f"judge {name}/{key}": value for name, judge in judges.items() for key, value in judge.identity.items()},
        "model": model_digest(recipe.model),
        "dtype": recipe.model.dtype,
        "lora": str(recipe.model.lora if recipe.model.use_peft else None),
    }


# ---- Before the first round.


def _check_stages(recipe: LoopRecipe, options: JudgeOptions, log: Log) -> None:
    """Find mistakes in the settings of later stages now, and not after hours of sampling.

    Prompts are read and rendered, annotator and judges score two invented answers each (a server is not asked, but its
    key must exist), and a trainer is made, without training a step.
    """
    log("checking the settings of all stages")
    if recipe.settings.engine == "vllm":
        load_vllm(recipe.start())
    prompts = [
        sorted(
            Job.prepare(recipe.start(), source, settings, recipe.settings.engine, lambda line: None).prompts,
            key=lambda prompt: len(prompt.ids),
        )
        for source, settings in (
            (recipe.training_prompts, recipe.sampling),
            (recipe.held_out_prompts, recipe.held_out_sampling),
        )
    ]
    quiet = dataclasses.replace(options, log=lambda line: None)
    if options.client is not None:
        options.client.endpoint.api_key()
    rows = [Answers.to(one, ("Answer 0.", "Answer 1.")) for one in prompts[0]]
    for name in recipe.settings.annotators:
        if name != "api":
            annotator = make_annotator(name, quiet)
            annotator.check(rows)
            annotator.score(rows[:_TRIED])
    invented = [Pair.to(one, "Answer 0.", "Answer 1.") for one in prompts[1]]
    for judge in make_judges([name for name in recipe.judges if name != "api"], quiet).values():
        judge.check(invented)
        judge.compare(invented[:_TRIED])
    free_memory()

    n = recipe.sampling.n
    answers = {"responses": [f"Answer {number}." for number in range(n)], "scores": [*range(n)]}
    records = [{"id": one.id, "prompt": one.content, **one.context.columns, **answers} for one in prompts[0][:_TRIED]]
    pairs, _ = make_pairs(records, dataclasses.replace(recipe.pairs, min_gap=0.0, max_length_ratio=None))
    config = copy.deepcopy(recipe.config)
    config.report_to, config.load_best_model_at_end = [], False
    config.eval_strategy = type(config.eval_strategy)("no")
    name = recipe.model.model_name_or_path
    with TemporaryDirectory() as folder, third_party(IMPOSSIBLE):
        config.output_dir = folder
        trainer = PreferenceTrainer(
            PreferenceTrainer.load(name, recipe.model),
            args=config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=load_tokenizer(name, recipe.model, chat_template=recipe.settings.chat_template),
        )
        check_optimizer(trainer)
    del trainer
    free_memory()


def _confirm_cost(recipe: LoopRecipe, options: JudgeOptions, rounds: int, log: Log) -> None:
    """Ask the user once about the requests of all rounds, estimated with answers of the greatest possible length."""
    annotator = make_annotator(recipe.settings.annotator, options, recipe.settings.annotator_normalization)
    answerer = Answerer(recipe.start(), recipe.sampling)
    training, held_out = (read_prompts(rows)[0] for rows in _prompt_rows(recipe).values())
    if shared := len({prompt.id for prompt in training} & {prompt.id for prompt in held_out}):
        log(f"note: {shared:,} of {len(held_out):,} eval_prompts are also among prompts, which are trained on")
    answers = [answerer.placeholder_answer(f"a{k}") for k in range(recipe.sampling.n)]
    estimate = annotator.estimate([Answers.to(prompt, answers) for prompt in training])
    a, b = ([answerer.placeholder_answer(f"{side}{k}") for k in range(recipe.settings.eval_n)] for side in "ab")
    pairs = [Pair.to(prompt, *two) for prompt in held_out for two in product(a, b)]
    estimates = [estimate, *(judge.estimate(pairs) for judge in make_judges(recipe.judges, options).values())]
    confirm_cost(sum(estimates, Estimate()) * rounds, yes=recipe.settings.yes, log=log)


# ---- The rounds, and their summary.


def _run_rounds(rounds: Rounds) -> list[Metric]:
    """Run all rounds, plot them and return the metrics of the loop."""
    settings = rounds.recipe.settings
    found: dict[int, list[Metric]] = {}
    rounds.sample_start_answers()
    last_good = 0
    for number in range(1, settings.rounds + 1):
        folder = rounds.folder / f"round-{number}"
        done = (folder / ROUND_FILE).exists()
        found[number] = read_results(folder / FILE_NAME).metrics if done else rounds.run(number)
        rate = next(metric for metric in found[number] if metric.name.startswith(_WIN_RATE))  # by the first judge
        kl = next(metric for metric in found[number] if metric.name == "kl")
        shown = ["unknown" if metric.value is None else f"{metric.value:.3g}" for metric in (rate, kl)]
        rounds.log(f"round {number}: {rate.name} {shown[0]}, KL {shown[1]}")
        reason = None
        if settings.stop_win_rate is not None and rate.value is not None and rate.value < settings.stop_win_rate:
            reason = f"{rate.name} {shown[0]} is below stop_win_rate {settings.stop_win_rate:g}"
        elif settings.stop_kl is not None and kl.value is not None and kl.value > settings.stop_kl:
            reason = f"KL {shown[1]} is above stop_kl {settings.stop_kl:g}"
        if reason is not None:
            rounds.log(f"stopped after round {number}: {reason}")
            break
        last_good = number
    _plot(rounds.folder, found)
    metrics = [Metric("rounds", len(found)), Metric("last_good_round", last_good)]
    for number, of_round in found.items():
        metrics += [dataclasses.replace(metric, name=f"round-{number}/{metric.name}") for metric in of_round]
    return metrics


def _plot(folder: Path, rounds: Mapping[int, Sequence[Metric]]) -> None:
    win_rates: dict[str, list[Interval]] = {}
    kl = []
    for metric in (metric for metrics in rounds.values() for metric in metrics):
        value = float("nan") if metric.value is None else metric.value
        interval = Interval(value, metric.low, metric.high, metric.n or 0, metric.method or "")
        if metric.name.startswith(_WIN_RATE):
            win_rates.setdefault(metric.name.removeprefix(_WIN_RATE), []).append(interval)
        elif metric.name == "kl":
            kl.append(interval)
    plot_rounds(folder / PLOT, win_rates, kl)


def print_loop(folder: Path) -> None:
    """Print a finished loop's table, with a row for every round."""
    rows: dict[str, dict[str, Metric]] = {}
    for metric in read_results(folder / FILE_NAME).metrics:
        number, slash, name = metric.name.partition("/")
        if slash and metric.stage != "before" and not name.startswith(_NOT_IN_TABLE):
            rows.setdefault(number.removeprefix("round-"), {})[name] = metric
    columns = list(dict.fromkeys(name for found in rows.values() for name in found))
    lines = [
        [number, *(found[name].text if name in found else "" for name in columns)] for number, found in rows.items()
    ]
    title = "simpo loop: every round compared with the start"
    print_full_width(Console(), table_of(["round", *columns], lines, names=0, title=title))
