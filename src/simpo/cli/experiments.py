"""Commands that train many models: simpo sweep, loop and reproduce."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from simpo.cli._shared import print_report, read_settings, recipe_of, require_single_process
from simpo.cli.training import make_job, parse, require_output_dir
from simpo.config import check_values, keys_of, parse_settings, setting
from simpo.config.parse import split_options
from simpo.errors import SimpoError, third_party
from simpo.generation.settings import SamplingSettings
from simpo.judging.settings import GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.training.configs import PreferenceConfig
from simpo.training.run import TrainingJob
from simpo.training.settings import DataArguments
from simpo.workflows.loop import LoopRecipe, LoopSettings, print_loop, run_loop
from simpo.workflows.pair import PairSettings
from simpo.workflows.reproduction import run as reproduction
from simpo.workflows.reproduction.study import read_studies
from simpo.workflows.sweep import BEST, SMALLER_IS_BETTER, Sweep, print_sweep, run_sweep
from simpo.workflows.sweep_study import Axis, combinations, load_optuna, read_axes

# ---- simpo sweep.

_TPE_TRIALS = 20
_METRICS = [name.removeprefix("eval_") for name in SMALLER_IS_BETTER]


@dataclass(frozen=True)
class SweepSettings:
    """Search."""

    sampler: Literal["grid", "tpe"] = setting("grid", "grid tries every combination; tpe samples promising ones.")
    trials: int | None = setting(None, f"Number of trials with tpe (default: {_TPE_TRIALS}).")
    metric: str = setting(
        "rewards/accuracies", f"Metric on held-out pairs that ranks the trials: one of {', '.join(_METRICS)}."
    )
    prune: bool = setting(False, "Stop trials that are worse than the median at an evaluation.")
    output_dir: Path | None = setting(None, "Folder of the sweep (default: the recipe's output_dir plus -sweep).")

    def __post_init__(self) -> None:
        if self.full_metric not in SMALLER_IS_BETTER:
            raise SimpoError(f"metric: {self.metric!r} cannot rank trials; choose one of {', '.join(_METRICS)}")

    @property
    def full_metric(self) -> str:
        """Name of the metric, with the prefix ``eval_``."""
        return f"eval_{self.metric.removeprefix('eval_')}"


def sweep(argv: list[str]) -> None:
    """Search for good hyperparameters.

    Any key of simpo train can be varied, as A,B,C or (with --sampler tpe) LOW..HIGH, or set for all trials.

    examples:
      simpo sweep recipe.yaml --learning_rate 3e-7,5e-7,1e-6 --beta 2,10
      simpo sweep recipe.yaml --sampler tpe --trials 30 --learning_rate 1e-7..1e-5 --beta 1..10 --prune
    """
    require_single_process("sweep", "start it without torchrun, once on every GPU")
    search, recipe = _read(argv)
    load_optuna()
    with _deduplicated_notices():
        results = run_sweep(search, recipe)
    if results is not None:
        best = print_sweep(search)
        print(f"best recipe: {search.folder / BEST}\nbest model:  {best}")
        print_report(search.folder)
        print(f"next:        simpo chat {shlex.quote(str(best))}")


def _read(argv: list[str]) -> tuple[Sweep, dict[str, Any]]:
    """Return the sweep, and the recipe's keys as written."""
    path = recipe_of(argv)
    plain, options = split_options(argv[0 if path is None else 1 :])
    given: dict[str, list[str]] = {"model_name_or_path": plain} if plain else {}
    for name, texts in options:
        key = "model_name_or_path" if name == "model" else name
        given.setdefault(key, []).extend(texts)
    # Only the sweep's own settings are parsed here; each trial parses the rest.
    sweep_keys = [name for name in given if name in keys_of([SweepSettings])]
    arguments = [argument for name in sweep_keys for argument in (f"--{name}", *given.pop(name))]
    arguments += [argument for argument in argv if argument in ("-h", "--help")]
    (settings,) = parse_settings(arguments, (SweepSettings,), command="sweep", about=sweep.__doc__)
    keys = keys_of((ModelArguments, DataArguments, PreferenceConfig, GenerationArguments))
    axes = read_axes(given, {name: key.annotation for name, key in keys.items()})
    if not axes:
        raise SimpoError("nothing to vary: give a key several values, as in --learning_rate 3e-7,5e-7,1e-6")
    recipe = {} if path is None else _load_recipe(path)
    if settings.output_dir is None and "output_dir" not in recipe:
        raise SimpoError("--output_dir: missing; name a folder for the sweep")
    search = Sweep(
        folder=settings.output_dir or Path(f"{recipe['output_dir']}-sweep").expanduser(),
        recipe=path,
        fixed={key: texts for key, texts in given.items() if key not in {axis.key for axis in axes}},
        axes=axes,
        metric=settings.full_metric,
        sampler=settings.sampler,
        trials=_number_of_trials(settings.sampler, settings.trials, axes),
        prune=settings.prune,
        read=_read_trial,
        argv=argv,
    )
    return search, recipe


def _read_trial(argv: list[str]) -> TrainingJob:
    return make_job(parse(argv, PreferenceConfig, GenerationArguments), argv)


def _load_recipe(path: Path) -> dict[str, Any]:
    """Load a recipe as plain YAML. Mistakes in it are reported when the first trial parses it."""
    recipe = None
    with suppress(SimpoError), third_party(str(path)):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    return recipe if isinstance(recipe, dict) else {}


def _number_of_trials(sampler: str, requested: int | None, axes: Sequence[Axis]) -> int:
    ranges = [axis.key for axis in axes if axis.range_of is not None]
    if sampler == "tpe":
        if requested is not None and requested < 1:
            raise SimpoError(f"--trials: must be at least 1, not {requested}")
        return requested or _TPE_TRIALS
    if ranges:
        raise SimpoError(f"--{ranges[0]}: a grid needs values, not a range; write A,B,C or add --sampler tpe")
    count = sum(1 for _ in combinations(axes))
    if requested is not None:
        raise SimpoError(f"--trials: a grid runs all {count} combinations; leave it out or add --sampler tpe")
    return count


@contextmanager
def _deduplicated_notices() -> Iterator[None]:
    """Log each notice about the recipe once, although every trial parses it."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return text not in seen and not seen.add(text)  # type: ignore[func-returns-value]

    reader = logging.getLogger("simpo.config")
    reader.addFilter(is_new)
    try:
        yield
    finally:
        reader.removeFilter(is_new)


# ---- simpo loop.

LOOP_TYPES = (LoopSettings, SamplingSettings, PairSettings, ModelArguments, PreferenceConfig)


def loop(argv: list[str]) -> None:
    """Train on the model's own answers in rounds: sample, annotate, pair, train, and repeat.

    examples:
      simpo loop recipes/loop/qwen3-0.6b.yaml --output_dir outputs/loop
      simpo loop recipes/loop/qwen3-0.6b.yaml --rounds 5 --stop_win_rate 0.5
    """
    # Checked first, because creating the configuration would wait for the other processes.
    require_single_process(
        "loop",
        "start it without torchrun, or run its stages one by one (simpo sample and simpo train support torchrun)",
    )
    recipe = LoopRecipe(*parse_settings(argv, LOOP_TYPES, command="loop", about=loop.__doc__))
    require_output_dir(recipe.config)
    recipe.config.disable_tqdm = recipe.config.disable_tqdm or not sys.stderr.isatty()  # the log has the progress
    folder = Path(recipe.config.output_dir)
    model = run_loop(recipe, argv=argv, file=recipe_of(argv))
    print_loop(folder)
    print_report(folder)
    print(f"model: {model}\nnext:  simpo chat {shlex.quote(str(model))}")


# ---- simpo reproduce.


@dataclass(kw_only=True)
class ReproduceSettings:
    """Studies and output."""

    studies: list[str] = setting([], "Studies to run, by name or number (default: all); also as first arguments.")
    output_dir: Path = setting(Path("runs/reproduce"), "Folder of the run; reuse it to resume or to add studies.")
    processes: int = setting(min(2, os.cpu_count() or 1), "Number of trials to run in parallel.", least=1)
    setting: str | None = setting(None, "Only print the commands for one of the paper's settings, e.g. llama3-base.")

    def __post_init__(self) -> None:
        check_values(self)


def reproduce(argv: list[str]) -> None:
    """Test the SimPO paper's claims in miniature, each with an interval and a verdict by a fixed rule.

    examples:
      simpo reproduce ablation gamma --output_dir runs/reproduce
      simpo reproduce 1 --setting llama3-base
    """
    plain, _ = split_options(argv)
    studies_option = ["--studies", *plain] if plain else []
    settings = read_settings(reproduce, ReproduceSettings, [*studies_option, *argv[len(plain) :]])
    studies = read_studies(settings.studies)
    if settings.setting is not None:
        print("\n".join(reproduction.plan(studies, settings.setting)))
        return
    outcomes = reproduction.reproduce(studies, settings.output_dir, processes=settings.processes, argv=argv)
    for outcome in outcomes:
        print(f"{outcome.verdict:<19} {outcome.claim.claim}")
    counts = Counter(outcome.verdict for outcome in outcomes)
    print("claims: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    print(f"page:   {settings.output_dir / reproduction.PAGE}")
