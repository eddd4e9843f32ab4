"""Train a reward model on comparisons.

examples:
  simpo reward recipes/reward-llama-3-8b-instruct.yaml --output_dir outputs/reward
  simpo reward org/model --dataset_name pairs.jsonl --learning_rate 9e-6 --output_dir outputs/reward
"""

from __future__ import annotations

from simpo.cli._shared import run
from simpo.training.reward import RewardTrainer


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    following = "simpo annotate RESPONSES --annotator reward:{folder}"
    return run(RewardTrainer, argv, about=__doc__, following=following)
