"""Search for good hyperparameters: simpo sweep RECIPE.yaml --learning_rate 3e-7,5e-7,1e-6 --beta 2,10"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from simpo.cli._shared import read, recipe_of, refuse_several
from simpo.config import keys_of
from simpo.config.arguments import ArgumentParser
from simpo.errors import SimpoError
from simpo.evaluation.during_training import GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.training.settings import DataArguments
from simpo.training.tasks import PREFERENCES
from simpo.training.trainer import PreferenceConfig
from simpo.workflows.sweep import BEST, EFFECTS, SMALLER_IS_BETTER, Sweep, print_sweep, run_sweep
from simpo.workflows.sweep_space import Choices, combinations, read_axes
from simpo.workflows.sweep_study import load_optuna

_TPE_TRIALS = 20
_METRICS = [name.removeprefix("eval_") for name in SMALLER_IS_BETTER]


def main(argv: list[str]) -> int:
    """Parse, run the trials, print their table and what to do next."""
    refuse_several("sweep", "start it without torchrun, once on every GPU")
    sweep, recipe = _read(argv)
    load_optuna()
    with _notices_once():
        results = run_sweep(sweep, recipe)
    if results is not None:
        best = print_sweep(sweep)
        print(f"best recipe: {sweep.folder / BEST}\nbest model:  {best}\nplot:        {sweep.folder / EFFECTS}")
        print(f"next:        simpo chat {shlex.quote(str(best))}")
    return 0


def _read(argv: list[str]) -> tuple[Sweep, dict[str, Any]]:
    """The sweep, and the recipe's keys as written."""
    path = recipe_of(argv)
    options, rest = _parser().parse_known_args(_with_model_named(argv[0 if path is None else 1 :]))
    given = _options(rest)
    keys = keys_of((ModelArguments, DataArguments, PreferenceConfig, GenerationArguments))
    axes = read_axes(given, {name: key.annotation for name, key in keys.items()})
    if not axes:
        raise SimpoError("nothing is varied: give a key several values, as in --learning_rate 3e-7,5e-7,1e-6")
    recipe = {} if path is None else _keys(path)
    sweep = Sweep(
        folder=_folder(options.output_dir, recipe),
        recipe=path,
        fixed={key: texts for key, texts in given.items() if key not in {axis.key for axis in axes}},
        axes=axes,
        metric=_metric(options.metric),
        sampler=options.sampler,
        trials=_trials(options.sampler, options.trials, axes),
        prune=options.prune,
        read=partial(read, PREFERENCES, PreferenceConfig),
        argv=argv,
    )
    return sweep, recipe


def _with_model_named(argv: list[str]) -> list[str]:
    """The arguments with ``--model_name_or_path`` for ``--model`` and for a model before the options."""
    argv = [re.sub(r"^--model(?=$|=)", "--model_name_or_path", word) for word in argv]
    return ["--model_name_or_path", *argv] if argv and not argv[0].startswith("-") else argv


def _keys(path: Path) -> dict[str, Any]:
    """A recipe's keys and values as YAML reads them; what is wrong with it is said when the first trial is read."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _folder(asked: str | None, recipe: dict[str, Any]) -> Path:
    if asked is None and "output_dir" not in recipe:
        raise SimpoError("--output_dir: name the folder of the sweep")
    return Path(asked or f"{recipe['output_dir']}-sweep").expanduser()


def _parser() -> ArgumentParser:
    parser = ArgumentParser("sweep", __doc__)
    parser.usage = "simpo sweep [RECIPE.yaml] --KEY A,B,C [--KEY LOW..HIGH] [--key value] [options]"
    parser.epilog = "Every key of a recipe can be varied, or set for all trials; simpo train --help lists them."
    parser.add_argument("--sampler", choices=("grid", "tpe"), default="grid", help="every combination, or draw (grid)")
    parser.add_argument("--trials", type=int, metavar="N", help=f"how many tpe draws (default {_TPE_TRIALS})")
    parser.add_argument(
        "--metric",
        default="rewards/accuracies",
        metavar="NAME",
        help=f"on held-out pairs after training, one of {', '.join(_METRICS)} (default rewards/accuracies)",
    )
    parser.add_argument("--prune", action="store_true", help="break off trials below the median at an evaluation")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the sweep (default: the recipe's, with -sweep)")
    return parser


def _options(words: Sequence[str]) -> dict[str, list[str]]:
    """What stands behind every ``--key``."""
    found: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            found.setdefault(key, []).extend([value] if equals else [])
        elif key is None:
            raise SimpoError(f"{word}: expected [RECIPE.yaml] [--key value ...]")
        else:
            found[key].append(word)
    return found


def _metric(name: str) -> str:
    found = f"eval_{name.removeprefix('eval_')}"
    if found not in SMALLER_IS_BETTER:
        raise SimpoError(f"--metric: {name!r} tells no better from worse; there are {', '.join(_METRICS)}")
    return found


def _trials(sampler: str, asked: int | None, axes: Sequence[Any]) -> int:
    ranges = [axis.key for axis in axes if not isinstance(axis, Choices)]
    if sampler == "tpe":
        if asked is not None and asked < 1:
            raise SimpoError(f"--trials: must be at least 1, not {asked}")
        return asked or _TPE_TRIALS
    if ranges:
        raise SimpoError(f"--{ranges[0]}: a grid has values, not a range; write A,B,C or add --sampler tpe")
    count = sum(1 for _ in combinations(axes))
    if asked is not None:
        raise SimpoError(f"--trials: a grid has all its combinations, here {count}; leave it out or add --sampler tpe")
    return count


@contextmanager
def _notices_once() -> Iterator[None]:
    """Say every notice about the recipe once, although all trials read it."""
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
