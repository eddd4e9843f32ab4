"""Train a model on its own answers, scored by an annotator: policy gradients, or preference objectives.

examples:
  simpo online recipes/tiny/rloo.yaml
  simpo online org/model --dataset_name prompts.jsonl --annotator reward:org/rm --objective grpo --output_dir out
"""

from __future__ import annotations

from simpo.cli._shared import parse, run
from simpo.judging.settings import AnnotatorArguments, GenerationArguments
from simpo.training.online_config import OnlineConfig


def main(argv: list[str]) -> int:
    """Parse, train, print the table of results and what to do next."""
    *parts, annotator = parse(
        argv, OnlineConfig, GenerationArguments, AnnotatorArguments, command="online", about=__doc__
    )
    from simpo.training.online import OnlineTrainer  # noqa: PLC0415 - slow, and --help does not need it
    from simpo.workflows.online import Annotation  # noqa: PLC0415

    callback = Annotation(annotator, parts[0])
    return run(OnlineTrainer, parts, argv, following="simpo chat {folder}", callbacks=[callback])
