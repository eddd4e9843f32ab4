"""Which data a run trains and is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from simpo.data.mixtures import load_mixture, load_mixture_list
from simpo.data.sources import load_rows
from simpo.errors import CombinedError


@dataclass
class DataArguments:
    """Where the rows come from: one data set, or the paper's ``dataset_mixer``, or alignment-handbook's mixture."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, file or folder of the training data."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of dataset_name to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Hub id, file or folder of held-out data."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Held-out split, of eval_dataset_name (default test) or else dataset_name."}
    )
    dataset_mixer: dict[str, float] | None = field(
        default=None, metadata={"help": "Data sets, and the fraction of each one's training split that is used."}
    )
    dataset_splits: list[str] | None = field(default=None, metadata={"help": "Splits of dataset_mixer's data sets."})
    dataset_configs: list[str] | None = field(default=None, metadata={"help": "Their configurations, in that order."})
    dataset_mixture: dict[str, Any] | None = field(
        default=None, metadata={"help": "Data sets with weights, as alignment-handbook gives them."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "A chat template, a file with one, or none for raw text (default: the tokenizer's own)."},
    )

    def __post_init__(self) -> None:
        given = [key for key in ("dataset_name", "dataset_mixer", "dataset_mixture") if getattr(self, key) is not None]
        mistakes = []
        if not given:
            mistakes.append("dataset_name: name the data to train on (a hub id, a file or a folder)")
        if len(given) > 1:
            mistakes.append(f"{' and '.join(given)}: give one of them")
        template = self.chat_template or "none"
        if "{" not in template and template.strip().lower() != "none" and not Path(template).expanduser().is_file():
            mistakes.append(
                f"chat_template: {template[:80]!r} is neither a template nor a file of one; leave it out for the "
                "tokenizer's own"
            )
        if mistakes:
            raise CombinedError(*mistakes)


def load_datasets(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows where the arguments name some; raw, in any shape.

    Raises:
        SimpoError: a data set, split or file that is not there or cannot be read.
    """
    train, held_out = _training_rows(arguments)
    if arguments.eval_dataset_name is not None:
        held_out = load_rows(arguments.eval_dataset_name, split=arguments.dataset_test_split or "test")
    return train, held_out


def _training_rows(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    if arguments.dataset_mixer is not None:
        splits = arguments.dataset_splits or ["train", "test"]
        return load_mixture(arguments.dataset_mixer, splits, arguments.dataset_configs)
    if arguments.dataset_mixture is not None:
        return load_mixture_list(arguments.dataset_mixture)
    name, config = str(arguments.dataset_name), arguments.dataset_config
    train = load_rows(name, split=arguments.dataset_train_split, config=config)
    if arguments.eval_dataset_name is None and arguments.dataset_test_split is not None:
        return train, load_rows(name, split=arguments.dataset_test_split, config=config)
    return train, None
