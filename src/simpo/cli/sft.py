"""Fine-tune a model on demonstrations.

examples:
  simpo sft recipes/llama-3-8b-base-sft.yaml --output_dir outputs/sft
  simpo sft org/model --dataset_name conversations.jsonl --max_length 2048 --output_dir outputs/sft
"""

from __future__ import annotations

from simpo.cli._shared import parse, run
from simpo.judging.settings import GenerationArguments
from simpo.training.configs import SFTConfig


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    parts = parse(argv, SFTConfig, GenerationArguments, command="sft", about=__doc__)
    from simpo.training.sft import SFTTrainer  # noqa: PLC0415 - slow, and --help does not need it

    return run(SFTTrainer, parts, argv, following="simpo train --model_name_or_path {folder} --dataset_name PAIRS")
