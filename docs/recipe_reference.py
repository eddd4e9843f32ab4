"""Generate recipe-reference.md from the settings declared in the code: python docs/recipe_reference.py"""

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

# The TrainingArguments keys that most runs set, with our own descriptions.
_COMMON = {
    "output_dir": "The run folder; use the same one to resume a killed run.",
    "learning_rate": "Peak learning rate.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Stop after this many optimizer steps; -1: train for `num_train_epochs`.",
    "per_device_train_batch_size": "Rows per optimizer step on each device; memory depends on `max_batch_tokens`.",
    "gradient_accumulation_steps": "Multiplies `per_device_train_batch_size`; both have the same effect here.",
    "per_device_eval_batch_size": "Rows evaluated together on each device.",
    "lr_scheduler_type": "Learning-rate schedule.",
    "warmup_steps": "Warm-up steps; a value below 1 is a share of all steps.",
    "optim": "Optimizer.",
    "weight_decay": "Weight decay.",
    "max_grad_norm": "Gradients are clipped to this norm.",
    "bf16": "Compute in bfloat16; the weights stay in float32.",
    "gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
    "logging_steps": "Optimizer steps between log entries.",
    "eval_strategy": "When to evaluate held-out rows during training: `no`, `steps` or `epoch`.",
    "eval_steps": "How often to evaluate with `steps`; by default `logging_steps`.",
    "save_strategy": "When to save checkpoints: `no`, `steps`, `epoch` or `best`.",
    "save_steps": "How often to save with `steps`.",
    "save_total_limit": "Maximum number of checkpoints to keep.",
    "resume_from_checkpoint": "A checkpoint to start from if `output_dir` has none.",
    "seed": "Seed of the order of rows and of dropout.",
    "data_seed": "Seed of the order of rows only; by default `seed`.",
    "train_sampling_strategy": "Order of the rows: `random` or `sequential`.",
    "report_to": "Experiment trackers, such as `wandb` or `tensorboard`.",
    "run_name": "Name of the run in the trackers.",
    "deepspeed": "DeepSpeed configuration.",
    "fsdp": "Shard the model across devices.",
    "use_cache": "Value of `use_cache` in the saved model's configuration; training uses no cache.",
    "torch_compile": "Compile the model.",
}


def page() -> str:
    """Return the whole page in Markdown."""
    return "\n".join([*_from_model_to_loss(), *_sampling(), *_trainer()])


def _from_model_to_loss() -> list[str]:
    """Return the sections on models, data, batches, objectives and reward models."""
    inherited = keys_of([TrainingArguments]).keys()
    return [
        "# Recipe reference",
        "",
        "<!-- Written by docs/recipe_reference.py from the code; change the code and run it again. -->",
        "",
        "Every key of the training commands. Set a key in a recipe (`key: value`) or on the command line",
        "(`--key value`), which takes precedence. An empty default means that the key is not set (`null`).",
        "",
        "## Model",
        "",
        *_table(ModelArguments, _names(ModelArguments)),
        "",
        "## Data",
        "",
        "Set one of `dataset_name`, `dataset_mixer` and `dataset_mixture`. See [Data formats](data-formats.md).",
        "",
        *_table(DataArguments, _names(DataArguments)),
        "",
        "## Rows, batches and forward passes",
        "",
        *_table(TrainingSettings, [name for name in _names(TrainingSettings) if name not in inherited]),
        "",
        "## Objective",
        "",
        "For `simpo train` only. For good values, see [Choosing hyperparameters](choosing-hyperparameters.md).",
        "",
        *_table(
            PreferenceConfig, [n for n in _own(PreferenceConfig) if n not in {*inherited, *hyperparameter_names()}]
        ),
        *(line for row in OBJECTIVES.values() for line in _objective(row)),
        "",
        "## Reward models",
        "",
        "For `simpo reward` only. See [Reward models](reward-models.md).",
        "",
        *_table(RewardConfig, [n for n in _own(RewardConfig) if n not in inherited]),
        "",
    ]


def _sampling() -> list[str]:
    """Return the sections on answers during training, online training and on-policy rounds."""
    inherited = keys_of([TrainingArguments]).keys()
    return [
        "## Answers during training",
        "",
        "See [Training](training.md#answers-during-training).",
        "",
        *_table(GenerationArguments, _names(GenerationArguments)),
        "",
        "## Online training",
        "",
        "For `simpo online`, besides the keys for model, objective and training. See [Online training](online.md).",
        "",
        *_table(OnlineConfig, [n for n in _own(OnlineConfig) if n not in inherited]),
        "",
        "The [engine](online.md#vllm) that samples the answers, and its arguments for vLLM:",
        "",
        *_table(EngineSettings, ["engine", *_names(VllmSettings)]),
        "",
        "The annotator:",
        "",
        *_table(AnnotatorArguments, _names(AnnotatorArguments)),
        "",
        "## On-policy rounds",
        "",
        "For `simpo loop`, besides the keys for model, objective and training. See [On-policy rounds](on-policy.md).",
        "",
        *_table(LoopSettings, _names(LoopSettings)),
        "",
        "How answers are sampled and paired. The `seed` is that of training:",
        "",
        *_table(SamplingSettings, [name for name in _names(SamplingSettings) if name != "seed"]),
        "",
        *_table(PairSettings, [name for name in _names(PairSettings) if name != "seed"]),
        "",
    ]


def _trainer() -> list[str]:
    """Return the section on the keys of ``TrainingArguments``."""
    return [
        "## Training",
        "",
        "All keys of transformers' `TrainingArguments` work here and are listed by `--help`, except for",
        f"{' and '.join(f'`{name}`' for name in UNSUPPORTED)}, which are rejected. The table lists common keys,",
        "and those whose default differs from transformers'. transformers 5.23 renames `gradient_checkpointing` to",
        "`activation_checkpointing`; both names work.",
        "",
        *_training_table(),
        "",
    ]


def _names(cls: type) -> list[str]:
    return list(keys_of([cls]))


def _own(cls: type) -> list[str]:
    """Return the fields that ``cls`` declares itself."""
    return [name for name in _names(cls) if name in inspect.get_annotations(cls)]


def _table(cls: type, names: Sequence[str]) -> list[str]:
    keys = keys_of([cls])
    return _markdown(
        ("key", "takes", "default", "meaning"),
        ((f"`{n}`", describe(keys[n].annotation), _default(keys[n]), keys[n].help) for n in names),
    )


def _objective(row: Objective) -> list[str]:
    """Return the loss, as stated in its docstring, and its hyperparameters."""
    summary = str(row.__doc__).partition("\n")[0].replace("``", "`")
    rows = [
        (f"`{name}`", describe(known.type), _value(known.default), known.bound.text if known.bound else "", known.help)
        for name, known in row.hyperparameters.items()
    ]
    for name, alias in row.aliases.items():
        kind = describe(row.hyperparameters[alias.of].type)
        rows.append((f"`{name}`", kind, "", "", f"Alternative spelling of `{alias.of}`."))
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
    """Return a value as written in a recipe."""
    if value is None:
        return ""
    plain = value.value if isinstance(value, Enum) else value
    return f"`{str(plain).lower() if isinstance(plain, bool) else plain}`"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
