"""Train a model on preference pairs.

examples:
  simpo train recipes/llama-3-8b-base-simpo.yaml --output_dir outputs/llama-3-simpo
  simpo train org/model --dataset_name pairs.jsonl --objective dpo --beta 0.1 --output_dir outputs/dpo
"""

from __future__ import annotations

from simpo.cli._shared import parse, run
from simpo.judging.settings import GenerationArguments
from simpo.training.configs import PreferenceConfig


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    parts = parse(argv, PreferenceConfig, GenerationArguments, command="train", about=__doc__)
    from simpo.training.preference import PreferenceTrainer  # noqa: PLC0415 - slow, and --help does not need it

    return run(PreferenceTrainer, parts, argv, following="simpo chat {folder}")
