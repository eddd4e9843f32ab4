"""Train a model on preference pairs.

examples:
  simpo train recipes/llama-3-8b-base-simpo.yaml --output_dir outputs/llama-3-simpo
  simpo train org/model --dataset_name pairs.jsonl --objective dpo --beta 0.1 --output_dir outputs/dpo
"""

from __future__ import annotations

from simpo.cli._shared import run
from simpo.training.preference import PreferenceTrainer


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    return run(PreferenceTrainer, argv, about=__doc__, following="simpo chat {folder}")
