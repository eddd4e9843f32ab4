"""Train a reward model on comparisons.

examples:
  simpo reward recipes/reward-llama-3-8b-instruct.yaml --output_dir outputs/reward
  simpo reward org/model --dataset_name pairs.jsonl --learning_rate 9e-6 --output_dir outputs/reward
"""

from __future__ import annotations

from simpo.cli._shared import parse, run
from simpo.training.configs import RewardConfig


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    parts = parse(argv, RewardConfig, command="reward", about=__doc__)
    from simpo.training.reward import RewardTrainer  # noqa: PLC0415 - slow, and --help does not need it

    return run(RewardTrainer, parts, argv, following="simpo annotate RESPONSES --annotator reward:{folder}")
