"""Train a model on preference pairs: simpo train [RECIPE.yaml] [--key value ...]"""

from __future__ import annotations

import sys

from simpo.recipe import parse_recipe
from simpo.results import print_results
from simpo.training.config import PreferenceConfig
from simpo.training.inputs import DataArguments
from simpo.training.models import ModelArguments
from simpo.training.run import train_preferences

TYPES = (ModelArguments, DataArguments, PreferenceConfig)

# Ways to name the data that exclude one another; one on the command line replaces the recipe's.
REPLACES = {
    "dataset_name": ("dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture"),
    "dataset_mixer": ("dataset_name", "dataset_mixture"),
    "dataset_mixture": ("dataset_name", "dataset_mixer", "dataset_splits", "dataset_configs"),
}


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    model, data, config = parse_recipe(argv, TYPES, replaces=REPLACES)
    config.disable_tqdm = config.disable_tqdm or not sys.stderr.isatty()  # the log has the progress there
    results = train_preferences(model, data, config)
    if config.process_index == 0:
        print_results(results)
        print(f"saved: {config.output_dir}\nnext:  {next_command(config.output_dir)}")
    return 0


def next_command(folder: str) -> str:
    """A command that shows the trained model at work."""
    return (
        f'python -c "from transformers import pipeline; '
        f"print(pipeline('text-generation', '{folder}')('Hello', max_new_tokens=64)[0]['generated_text'])\""
    )
