"""Sample, annotate, pair and train, round after round: simpo loop RECIPE.yaml [--key value ...]"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from simpo.cli._processes import refuse_several
from simpo.cli._training import check_named, recipe_of, with_model_named
from simpo.config import parse_recipe
from simpo.generation.settings import SamplingSettings
from simpo.models.settings import ModelArguments
from simpo.training.trainer import PreferenceConfig
from simpo.workflows.loop.report import PLOT, print_report
from simpo.workflows.loop.run import run_loop
from simpo.workflows.loop.settings import LoopRecipe, LoopSettings
from simpo.workflows.pair import PairSettings

RECIPE_TYPES = (LoopSettings, SamplingSettings, PairSettings, ModelArguments, PreferenceConfig)


def main(argv: list[str]) -> int:
    """Parse, run the rounds, print their table and what to do next."""
    # Before the configuration is made, which would wait for the others.
    refuse_several("loop", "start it without torchrun, or its stages one by one, simpo sample and simpo train with it")
    recipe = LoopRecipe(*parse_recipe(with_model_named(argv), RECIPE_TYPES))
    check_named(recipe.config)
    recipe.config.disable_tqdm = recipe.config.disable_tqdm or not sys.stderr.isatty()  # the log has the progress
    folder = Path(recipe.config.output_dir)
    model = run_loop(recipe, argv=argv, file=recipe_of(argv))
    print_report(folder)
    print(f"plot:  {folder / PLOT}\nmodel: {model}\nnext:  simpo chat {shlex.quote(str(model))}")
    return 0
