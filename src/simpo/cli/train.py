"""Train a model on preference pairs: simpo train [RECIPE.yaml] [--key value ...]"""

from __future__ import annotations

from simpo.cli._training import run
from simpo.training.tasks import PREFERENCES
from simpo.training.trainer import PreferenceConfig


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    return run(PREFERENCES, PreferenceConfig, argv, following="simpo chat {folder}")
