"""Writes recipe-reference.md next to itself from what the code declares: python docs/recipe_reference.py"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from simpo.config import Key, keys_of
from simpo.config.fields import describe
from simpo.generation.settings import EngineSettings, SamplingSettings, VllmSettings
from simpo.judging.settings import AnnotatorArguments, GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.objectives import OBJECTIVES, Objective
from simpo.training.configs import OnlineConfig, PreferenceConfig, hyperparameter_names
from simpo.training.reward import RewardConfig
from simpo.training.settings import UNSUPPORTED, DataArguments, TrainingSettings
from simpo.training.sft import SFTConfig
from simpo.workflows.loop import LoopSettings
from simpo.workflows.pair import PairSettings

PAGE = Path(__file__).with_name("recipe-reference.md")

# Keys of transformers that most runs set, in the words of this project.
_COMMON = {
    "output_dir": "The run's folder; the same one continues a killed run.",
    "learning_rate": "Peak learning rate.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Stop after so many optimizer steps; -1 leaves it to the epochs.",
    "per_device_train_batch_size": "Rows of an optimizer step and device; memory follows `max_batch_tokens` instead.",
    "gradient_accumulation_steps": "Multiplies the former, and is the same here.",
    "per_device_eval_batch_size": "Rows that are evaluated together on a device.",
    "lr_scheduler_type": "Learning-rate schedule.",
    "warmup_steps": "Warm-up steps, or below 1 their share of all steps.",
    "optim": "Optimizer.",
    "weight_decay": "Weight decay.",
    "max_grad_norm": "Gradients are clipped to this norm.",
    "bf16": "Compute in bfloat16 from weights that stay float32.",
    "gradient_checkpointing": "Compute activations again in backward: less memory, more time.",
    "logging_steps": "Log every so many optimizer steps.",
    "eval_strategy": "When held-out rows are evaluated while training: `no`, `steps` or `epoch`.",
    "eval_steps": "How often with `steps`; as `logging_steps` if not set.",
    "save_strategy": "When checkpoints are saved: `no`, `steps`, `epoch` or `best`.",
    "save_steps": "How often with `steps`.",
    "save_total_limit": "Checkpoints that are kept.",
    "resume_from_checkpoint": "A checkpoint to start from where `output_dir` has none.",
    "seed": "Of the rows' order and of dropout.",
    "data_seed": "Of the rows' order alone; as `seed` if not set.",
    "train_sampling_strategy": "Order of the rows: `random` or `sequential`.",
    "report_to": "Loggers, such as `wandb` or `tensorboard`.",
    "run_name": "The run's name there.",
    "deepspeed": "DeepSpeed's configuration.",
    "fsdp": "Shard the model over the devices.",
    "use_cache": "Generation's cache, in the saved model's configuration; training has none.",
    "torch_compile": "Compile the model.",
}


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([*_from_model_to_loss(), *_sampling(), *_trainer()])


def _from_model_to_loss() -> list[str]:
    """The sections on models, data, batches, objectives and reward models."""
    inherited = keys_of([TrainingArguments]).keys()
    return [
        "# Recipe reference",
        "",
        "<!-- Written by docs/recipe_reference.py from the code; change the code and run it again. -->",
        "",
        "The keys of the commands that train, the same in a recipe (`key: value`) and on the command line",
        "(`--key value`), which wins. An empty default is `null`: not set.",
        "",
        "## Model",
        "",
        *_table(ModelArguments, _names(ModelArguments)),
        "",
        "## Data",
        "",
        "One of `dataset_name`, `dataset_mixer` and `dataset_mixture`. See [Data formats](data-formats.md).",
        "",
        *_table(DataArguments, _names(DataArguments)),
        "",
        "## Rows, batches and forward passes",
        "",
        *_table(TrainingSettings, [name for name in _names(TrainingSettings) if name not in inherited]),
        "",
        "## Objective",
        "",
        "Of `simpo train` only. Which values to choose: [Choosing hyperparameters](choosing-hyperparameters.md).",
        "",
        *_table(
            PreferenceConfig, [n for n in _own(PreferenceConfig) if n not in {*inherited, *hyperparameter_names()}]
        ),
        *(line for row in OBJECTIVES.values() for line in _objective(row)),
        "",
        "## Reward models",
        "",
        "Of `simpo reward` only: [Reward models](reward-models.md).",
        "",
        *_table(RewardConfig, [n for n in _own(RewardConfig) if n not in inherited]),
        "",
    ]


def _sampling() -> list[str]:
    """The sections on answers during training, online training and on-policy rounds."""
    inherited = keys_of([TrainingArguments]).keys()
    return [
        "## Answers while it trains",
        "",
        "See [Training](training.md#answers-during-training).",
        "",
        *_table(GenerationArguments, _names(GenerationArguments)),
        "",
        "## Online training",
        "",
        "Keys of `simpo online`, next to those of model, objective and training: [Online training](online.md).",
        "",
        *_table(OnlineConfig, [n for n in _own(OnlineConfig) if n not in inherited]),
        "",
        "The [engine](online.md#vllm) that samples the answers, and vLLM's arguments:",
        "",
        *_table(EngineSettings, ["engine", *_names(VllmSettings)]),
        "",
        "The annotator:",
        "",
        *_table(AnnotatorArguments, _names(AnnotatorArguments)),
        "",
        "## On-policy rounds",
        "",
        "Keys of `simpo loop`, next to those of model, objective and training: [On-policy rounds](on-policy.md).",
        "",
        *_table(LoopSettings, _names(LoopSettings)),
        "",
        "How answers are drawn, and what becomes of them, with the `seed` of training:",
        "",
        *_table(SamplingSettings, [name for name in _names(SamplingSettings) if name != "seed"]),
        "",
        *_table(PairSettings, [name for name in _names(PairSettings) if name != "seed"]),
        "",
    ]


def _trainer() -> list[str]:
    """The section on the keys of ``TrainingArguments``."""
    return [
        "## Training",
        "",
        "All keys of transformers' `TrainingArguments` work here and are listed by `--help`, but",
        f"{' and '.join(f'`{name}`' for name in UNSUPPORTED)}, which are refused. The most used ones, and",
        "those whose default is not transformers'. In transformers 5.23 `gradient_checkpointing` is called",
        "`activation_checkpointing`; both names are understood.",
        "",
        *_training_table(),
        "",
    ]


def _names(cls: type) -> list[str]:
    return list(keys_of([cls]))


def _own(cls: type) -> list[str]:
    """The fields that ``cls`` itself declares."""
    return [name for name in _names(cls) if name in inspect.get_annotations(cls)]


def _table(cls: type, names: Sequence[str]) -> list[str]:
    keys = keys_of([cls])
    return _markdown(
        ("key", "takes", "default", "meaning"),
        ((f"`{n}`", describe(keys[n].annotation), _default(keys[n]), keys[n].help) for n in names),
    )


def _objective(row: Objective) -> list[str]:
    """The loss, in the words of its docstring, and its hyperparameters."""
    summary = str(row.__doc__).partition("\n")[0].replace("``", "`")
    rows = [
        (f"`{name}`", describe(known.type), _value(known.default), known.bound.text if known.bound else "", known.help)
        for name, known in row.hyperparameters.items()
    ]
    for name, spelling in row.spellings.items():
        kind = describe(row.hyperparameters[spelling.of].type)
        rows.append((f"`{name}`", kind, "", "", f"Another way to give `{spelling.of}`."))
    table = _markdown(("key", "takes", "default", "", "meaning"), rows) if rows else ["It has no hyperparameters."]
    return ["", f"### `{row.name}`", "", summary, f"({row.paper})", "", *table]


def _training_table() -> list[str]:
    train, sft, reward, theirs = (
        {name: _default(key) for name, key in keys_of([cls]).items() if name in _COMMON}
        for cls in (PreferenceConfig, SFTConfig, RewardConfig, TrainingArguments)
    )
    rows = []
    for name, meaning in _COMMON.items():
        others = {"sft": sft[name], "reward": reward[name]}
        ours = ", ".join([train[name], *(f"{task} {own}" for task, own in others.items() if own != train[name])])
        rows.append((f"`{name}`", ours, "" if ours == theirs[name] else theirs[name], meaning))
    return _markdown(("key", "default", "transformers'", "meaning"), rows)


def _default(key: Key) -> str:
    return "**required**" if key.default is dataclasses.MISSING else _value(key.default)


def _value(value: Any) -> str:
    """A value as a recipe has it."""
    if value is None:
        return ""
    plain = value.value if isinstance(value, Enum) else value
    return f"`{str(plain).lower() if isinstance(plain, bool) else plain}`"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
