"""Train a reward model on comparisons: simpo reward [RECIPE.yaml] [--key value ...]"""

from __future__ import annotations

from simpo.cli._training import run
from simpo.training.reward import RewardConfig
from simpo.training.tasks import REWARDS


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    return run(REWARDS, RewardConfig, argv, following="simpo annotate RESPONSES --annotator reward:{folder}")
