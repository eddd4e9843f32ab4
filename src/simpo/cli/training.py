"""Commands that train one model: simpo train, sft, reward and online."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.cli import PLAN_FIRST
from simpo.cli._shared import print_report, recipe_of
from simpo.config import parse_settings
from simpo.errors import SimpoError
from simpo.judging.settings import AnnotatorArguments, GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.training.configs import OnlineConfig, PreferenceConfig, RewardConfig, SFTConfig
from simpo.training.settings import REPLACES, DataArguments

# Trainers and engines take seconds to import, so they are imported where they are used: --help and errors in recipes
# stay fast.
if TYPE_CHECKING:
    from simpo.training.callbacks import RunCallback
    from simpo.training.packed import PackedTrainer
    from simpo.training.run import TrainingJob

_DEFAULT_OUTPUT_DIR = "trainer_output"  # transformers' default


def train(argv: list[str]) -> None:
    """Train a model on preference pairs.

    examples:
      simpo train recipes/llama-3-8b-base-simpo.yaml --output_dir outputs/llama-3-simpo
      simpo train org/model --dataset_name pairs.jsonl --objective dpo --beta 0.1 --output_dir outputs/dpo
    """
    parts = parse(argv, PreferenceConfig, GenerationArguments, command="train", about=train.__doc__)
    from simpo.training.preference import PreferenceTrainer  # noqa: PLC0415

    _run(PreferenceTrainer, parts, argv, next_command="simpo chat {folder}")


def sft(argv: list[str]) -> None:
    """Fine-tune a model on demonstrations.

    examples:
      simpo sft recipes/llama-3-8b-base-sft.yaml --output_dir outputs/sft
      simpo sft org/model --dataset_name conversations.jsonl --max_length 2048 --output_dir outputs/sft
    """
    parts = parse(argv, SFTConfig, GenerationArguments, command="sft", about=sft.__doc__)
    from simpo.training.sft import SFTTrainer  # noqa: PLC0415

    _run(SFTTrainer, parts, argv, next_command="simpo train --model_name_or_path {folder} --dataset_name PAIRS")


def reward(argv: list[str]) -> None:
    """Train a reward model on comparisons.

    examples:
      simpo reward recipes/reward-llama-3-8b-instruct.yaml --output_dir outputs/reward
      simpo reward org/model --dataset_name pairs.jsonl --learning_rate 9e-6 --output_dir outputs/reward
    """
    parts = parse(argv, RewardConfig, command="reward", about=reward.__doc__)
    from simpo.training.reward import RewardTrainer  # noqa: PLC0415

    _run(RewardTrainer, parts, argv, next_command="simpo annotate RESPONSES --annotator reward:{folder}")


def online(argv: list[str]) -> None:
    """Train a model online, on its own answers scored by an annotator: PPO, RLOO, GRPO and others.

    examples:
      simpo online recipes/tiny/rloo.yaml
      simpo online org/model --dataset_name prompts.jsonl --annotator reward:org/rm --objective grpo --output_dir out
    """
    kinds = (OnlineConfig, GenerationArguments, AnnotatorArguments)
    *parts, annotator = parse(argv, *kinds, command="online", about=online.__doc__)
    from simpo.evaluation.during_training import Annotation  # noqa: PLC0415
    from simpo.training.online import OnlineTrainer  # noqa: PLC0415

    _run(OnlineTrainer, parts, argv, next_command="simpo chat {folder}", callbacks=[Annotation(annotator, parts[0])])


def parse(argv: list[str], config_type: type, *more: type, command: str = "", about: str | None = None) -> Any:
    """Parse a training recipe and command line into model, data and configuration, plus any ``more`` dataclasses."""
    types = (ModelArguments, DataArguments, config_type, *more)
    if command:
        argv = [argument for argument in argv if argument != PLAN_FIRST]
    parts = parse_settings(argv, types, command=command, about=about, replaces=REPLACES)
    require_output_dir(parts[2])
    return parts


def require_output_dir(config: Any) -> None:
    """Raise :class:`SimpoError` unless the user named an output folder."""
    if config.output_dir == _DEFAULT_OUTPUT_DIR:
        raise SimpoError("output_dir is missing: give it in the recipe or as --output_dir")


def make_job(parts: Sequence[Any], argv: list[str], callbacks: Sequence[RunCallback] = ()) -> TrainingJob:
    """Build the training job for parsed settings (the result of :func:`parse`), with additional ``callbacks``."""
    from simpo.evaluation.during_training import Generations  # noqa: PLC0415
    from simpo.training.run import TrainingJob  # noqa: PLC0415

    model, data, config, *more = parts
    generations = [Generations(more[0], model)] if more and more[0].eval_generations else []
    config.disable_tqdm = config.disable_tqdm or not sys.stderr.isatty()  # the log shows progress there
    return TrainingJob(model, data, config, argv, recipe_of(argv), [*callbacks, *generations])


def _run(
    kind: type[PackedTrainer],
    parts: Sequence[Any],
    argv: list[str],
    *,
    next_command: str,
    callbacks: Sequence[RunCallback] = (),
) -> None:
    """Train with the settings ``parts``, then print the results and a command to run next.

    In ``next_command``, ``{folder}`` stands for the output folder.
    """
    from simpo.cli.plan import check_fit  # noqa: PLC0415
    from simpo.runs.results import print_results  # noqa: PLC0415
    from simpo.training.callbacks import Trackers  # noqa: PLC0415
    from simpo.training.run import run_training  # noqa: PLC0415

    if PLAN_FIRST in argv:
        check_fit(kind.command, parts)
    trackers = Trackers()
    job = make_job(parts, argv, [*callbacks, trackers])
    results = run_training(kind, job)
    if job.config.process_index == 0:
        folder = job.config.output_dir
        print_results(results)
        print(f"saved: {folder}")
        trackers.publish(Path(folder), print_report(Path(folder)))
        print(f"next:  {next_command.format(folder=shlex.quote(folder))}")
