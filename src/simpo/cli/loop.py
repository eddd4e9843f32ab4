"""Sample, annotate, pair and train, round after round.

examples:
  simpo loop recipes/llama-3-8b-loop.yaml --output_dir outputs/loop
  simpo loop recipes/llama-3-8b-loop.yaml --rounds 5 --stop_win_rate 0.5
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from simpo.cli._shared import check_named, print_report, recipe_of, require_single_process
from simpo.config import parse_settings
from simpo.generation.settings import SamplingSettings
from simpo.models.settings import ModelArguments
from simpo.training.preference import PreferenceConfig
from simpo.workflows.loop import LoopRecipe, LoopSettings, print_loop, run_loop
from simpo.workflows.pair import PairSettings

RECIPE_TYPES = (LoopSettings, SamplingSettings, PairSettings, ModelArguments, PreferenceConfig)


def main(argv: list[str]) -> int:
    """Parse, run the rounds, print their table and what to do next."""
    # Before the configuration is made, which would wait for the others.
    require_single_process(
        "loop", "start it without torchrun, or its stages one by one, simpo sample and simpo train with it"
    )
    recipe = LoopRecipe(*parse_settings(argv, RECIPE_TYPES, command="loop", about=__doc__))
    check_named(recipe.config)
    recipe.config.disable_tqdm = recipe.config.disable_tqdm or not sys.stderr.isatty()  # the log has the progress
    folder = Path(recipe.config.output_dir)
    model = run_loop(recipe, argv=argv, file=recipe_of(argv))
    print_loop(folder)
    print_report(folder)
    print(f"model: {model}\nnext:  simpo chat {shlex.quote(str(model))}")
    return 0
