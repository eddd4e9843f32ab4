"""Fine-tune a model on demonstrations: simpo sft [RECIPE.yaml] [--key value ...]"""

from __future__ import annotations

from simpo.cli._training import run
from simpo.training.sft import SFTConfig
from simpo.training.tasks import SUPERVISED


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    return run(SUPERVISED, SFTConfig, argv, following="simpo train --model_name_or_path {folder} --dataset_name PAIRS")
