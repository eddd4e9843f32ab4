"""Rules for recipes of other toolkits that need more than one key: data, schedules, kind of training and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any

from simpo.config.coercion import coerce
from simpo.config.foreign import is_off, reject

# A key's value and all keys with their values to keys of ours; raises ValueError where there is no counterpart.
Rule = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
Recipe = Mapping[str, Any]  # all keys with their values
NOTE = "note"  # among a rule's results, a remark about what is left out


@dataclass(frozen=True)
class Toolkit:
    """A toolkit whose recipes are converted."""

    name: str  # what it is called
    # Keys of which one is in every recipe of this toolkit and in none of the toolkits after it in the table.
    marks: Set[str]
    # The command that trains with a recipe, from its keys and path; ValueError if there is none.
    command: Callable[[Recipe, PurePath], str]
    rules: Mapping[str, Rule]  # by their key
    # By command, keys of ours whose default differs, where the recipe has not set them.
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _nothing(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {}


def _beta_of(loss_key: str) -> Rule:
    """A key for beta, which ORPO and IPO call by another name here."""
    return lambda value, recipe: {{"orpo": "lam", "ipo": "tau"}.get(str(recipe.get(loss_key)), "beta"): value}


# ---- LLaMA-Factory.


def _llama_factory_command(recipe: Recipe, path: PurePath) -> str:
    commands = {"dpo": "train", "kto": "train", "sft": "sft", "rm": "reward"}
    stage = str(recipe.get("stage", "sft"))
    if stage not in commands:
        raise ValueError(f"stage: {stage} has no counterpart here; there are {', '.join(commands)}")
    return commands[stage]


_registered = partial(
    reject, "names of LLaMA-Factory's dataset_info.json; write dataset_name with the hub id, file or folder"
)
_template = partial(
    reject,
    "the model's own chat template is used; if it has none, write chat_template with a template or a file of one",
)


def _held_out_share(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if is_off(value):
        return {}
    raise ValueError(f"write dataset_mixture with the data set and test_split_size: {value}")


_FINE_TUNING = {"num_train_epochs": "3", "lr_scheduler_type": "linear", "warmup_steps": "0", "learning_rate": "5e-5"}
_LLAMA_FACTORY = Toolkit(
    "LLaMA-Factory",
    {"stage", "finetuning_type", "cutoff_len", "dataset_dir"},
    _llama_factory_command,
    {
        **{
            "pref_beta": _beta_of("pref_loss"),
            "dataset": _registered,
            "eval_dataset": _registered,
            "template": _template,
        },
        "val_size": _held_out_share,
    },
    {
        "train": _FINE_TUNING | {"beta": "0.1", "gamma": "0.5"},
        "sft": _FINE_TUNING,
        "reward": _FINE_TUNING,
        "lora": {"lora_r": "8", "lora_alpha": "16", "lora_dropout": "0", "lora_target_modules": "all-linear"},
    },
)

# ---- Axolotl.


def _axolotl_command(recipe: Recipe, path: PurePath) -> str:
    rl = recipe.get("rl")
    if not is_off(rl):
        if rl not in ("dpo", "ipo", "simpo", "orpo", "kto"):
            raise ValueError(f"rl: {rl} has no counterpart in these commands")
        return "train"
    return "sft" if is_off(recipe.get("reward_model")) else "reward"


def _entry(source: Any) -> dict[str, Any]:
    """One of Axolotl's data sets as one of ``dataset_mixture``."""
    if not isinstance(source, Mapping) or not source.get("path"):
        raise ValueError("a data set without path; write dataset_name")
    path = source["path"]
    if path in ("json", "csv", "parquet", "arrow") and source.get("data_files"):
        files = source["data_files"]
        path = files if isinstance(files, str) else files[0] if len(files) == 1 else None
    if path is None:
        raise ValueError("several data_files; write dataset_mixture with an entry for each")
    return {"id": path, "config": source.get("name"), "split": source.get("split")}


def _entries(sources: Any) -> list[dict[str, Any]]:
    if sources and not isinstance(sources, list):
        raise ValueError("not a list of data sets")
    return [_entry(source) for source in sources or ()]


def _left_out(sources: Any) -> dict[str, str]:
    """A remark about keys of Axolotl's data sets that have no counterpart."""
    kept = {"path", "name", "split", "data_files", "ds_type", "type", "revision", "trust_remote_code"}
    others = sorted({key for source in sources for key, value in source.items() if key not in kept and value})
    kinds = [str(source.get("type")) for source in sources]
    others += [f"type {kind}" for kind in kinds if not kind.startswith(("chat_template", "chatml", "llama3", "None"))]
    if not others:
        return {}
    return {
        NOTE: f"{', '.join(others)}: rows are recognized by their columns (column_mapping renames them) and rendered "
        "with the chat template"
    }


def _datasets(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    entries = _entries(value)
    if not entries:
        return {}
    note = _left_out(value)
    size = recipe.get("val_set_size")
    if len(entries) == 1 and is_off(size):
        own = dict(zip(("dataset_name", "dataset_config", "dataset_train_split"), entries[0].values(), strict=True))
        return note | {key: item for key, item in own.items() if item is not None}
    mixture: dict[str, Any] = {
        "datasets": [{key: item for key, item in entry.items() if item is not None} for entry in entries]
    }
    if not is_off(size):
        mixture["test_split_size"] = coerce(str(size), int | float)
    return note | {"dataset_mixture": mixture}


def _test_datasets(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    entries = _entries(value)
    if not entries:
        return {}
    if len(entries) > 1:
        raise ValueError("write eval_dataset_name with one data set")
    entry = entries[0]
    split = {"dataset_test_split": entry["split"]} if entry["split"] else {}
    note = {NOTE: f"name {entry['config']}: a held-out data set has no configuration here"} if entry["config"] else {}
    return {"eval_dataset_name": entry["id"], **split, **note}


def _per_epoch(name: str) -> Rule:
    """A number of times per epoch as a share of all steps."""

    def rule(value: Any, recipe: Recipe) -> Mapping[str, Any]:
        if is_off(value):
            return {f"{name}_strategy": "no"}
        times = coerce(str(value), float) * coerce(str(recipe.get("num_epochs", 1)), float)
        if times <= 1:
            return {f"{name}_strategy": "epoch"}
        return {f"{name}_strategy": "steps", f"{name}_steps": f"{1 / times:.6g}"}

    return rule


def _axolotl_template(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value == "tokenizer_default":
        return {}
    if value == "jinja" or is_off(value):
        return {"chat_template": recipe["chat_template_jinja"]} if recipe.get("chat_template_jinja") else {}
    return _template(value, recipe)


def _special_tokens(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value and not isinstance(value, Mapping):
        raise ValueError("not tokens by name")
    others = [str(name) for name in value or {} if name != "pad_token"]  # padding is never scored
    if others:
        raise ValueError(f"{', '.join(others)}: change the tokenizer in the model's folder")
    return {}


def _precision(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {"bf16": "true" if str(value).lower() in ("auto", "full") else value}


def _fsdp(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {"fsdp": " ".join(map(str, value)) if isinstance(value, list) else value} if value else {}


_cpo_alpha = partial(reject, "write sft_weight, which is averaged within a response and then over pairs")

_AXOLOTL = Toolkit(
    "Axolotl",
    {"base_model", "sequence_len"},
    _axolotl_command,
    {
        **{"datasets": _datasets, "test_datasets": _test_datasets, "val_set_size": _nothing, "rl_beta": _beta_of("rl")},
        **{"evals_per_epoch": _per_epoch("eval"), "saves_per_epoch": _per_epoch("save")},
        **{"chat_template": _axolotl_template, "chat_template_jinja": _nothing, "special_tokens": _special_tokens},
        **{"bf16": _precision, "reward_model": _nothing, "cpo_alpha": _cpo_alpha, "fsdp": _fsdp, "strict": _nothing},
        **{"shuffle_merged_datasets": _nothing, "remove_unused_columns": _nothing},
    },
    {
        "train": {"num_train_epochs": "1", "lr_scheduler_type": "cosine", "warmup_steps": "0.03", "beta": "0.1"},
        "sft": {"num_train_epochs": "1", "lr_scheduler_type": "cosine", "warmup_steps": "0.03"},
        "reward": {"num_train_epochs": "1", "lr_scheduler_type": "cosine", "warmup_steps": "0.03"},
    },
)

# ---- open-instruct.


def _open_instruct_command(recipe: Recipe, path: PurePath) -> str:
    preference = {"beta", "loss_type", "dpo_beta", "dpo_loss_type"} & recipe.keys()
    return "train" if preference or any("dpo" in part for part in path.parts) else "sft"


def _mixer_list(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if not isinstance(value, list) or len(value) % 2:
        raise ValueError("not a list of data sets and fractions")
    return _mixer(dict(zip(value[::2], value[1::2], strict=True)), recipe)


def _mixer(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value and not isinstance(value, Mapping):
        raise ValueError("not data sets with their fractions")
    shares = {name: coerce(str(share), float) for name, share in (value or {}).items()}
    if not any(share > 1 for share in shares.values()):
        return {"dataset_mixer": shares, "dataset_splits": ["train"]} if shares else {}
    # A whole number above 1 is a number of rows there.
    entries = [
        {"id": name, "split": f"train[:{share:.0f}]"} if share > 1 else {"id": name, "weight": share}
        for name, share in shares.items()
    ]
    return {
        "dataset_mixture": {"datasets": entries},
        NOTE: "where a number of rows is given, the first ones are taken instead of a random sample",
    }


def _same_tokenizer(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value != recipe.get("model_name_or_path"):
        raise ValueError("the tokenizer is the model's own; put it into the model's folder")
    return {}


def _checkpointing_steps(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if is_off(value):
        return {}
    return {"save_strategy": "epoch"} if value == "epoch" else {"save_strategy": "steps", "save_steps": value}


def _tracking(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {} if is_off(value) or "report_to" in recipe else {"report_to": "wandb"}


def _trained_by_dpo(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    name = str(value)
    if name not in ("dpo", "dpo_norm", "simpo"):
        raise ValueError(f"{name} has no counterpart here")
    return {"objective": name}


_OPEN_INSTRUCT = Toolkit(
    "open-instruct",
    {"use_slow_tokenizer", "tokenizer_name", "tokenizer_name_or_path", "dataset_mixer_list", "with_tracking"},
    _open_instruct_command,
    {
        **{"dataset_mixer": _mixer, "dataset_mixer_list": _mixer_list, "tokenizer_name": _same_tokenizer},
        **{"tokenizer_name_or_path": _same_tokenizer, "checkpointing_steps": _checkpointing_steps},
        **{"with_tracking": _tracking, "loss_type": _trained_by_dpo, "dpo_loss_type": _trained_by_dpo},
        "dataset_mixer_list_splits": lambda value, recipe: {"dataset_splits": value},
    },
    {
        "train": {"objective": "dpo_norm", "beta": "5", "gamma_beta_ratio": "0.3", "num_train_epochs": "2"}
        | {"lr_scheduler_type": "linear", "warmup_steps": "0.03", "learning_rate": "2e-5"},
        "sft": {"num_train_epochs": "2", "lr_scheduler_type": "linear", "warmup_steps": "0.03"},
        "lora": {"lora_r": "64", "lora_alpha": "16", "lora_dropout": "0.1"},
    },
)

# ---- alignment-handbook.


def _handbook_command(recipe: Recipe, path: PurePath) -> str:
    preference = {"beta", "loss_type", "gamma_beta_ratio", "max_prompt_length"} & recipe.keys()
    return "train" if preference or _handbook_folder(path) in ("dpo", "orpo", "simpo") else "sft"


def _handbook_folder(path: PurePath) -> str:
    return next((part for part in path.parts if part in ("dpo", "orpo", "sft", "simpo")), "")


_TRL_LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "apo_zero": "apo_zero", "apo_down": "apo_down"}


def _trl_loss(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    name = value[0] if isinstance(value, list) and len(value) == 1 else value
    ours = _TRL_LOSSES.get(str(name))
    if ours is None:
        raise ValueError(f"{name} has no counterpart here")
    return {"objective": ours} | ({"length_normalized": "true"} if ours == "ipo" else {})


_HANDBOOK = Toolkit(
    "alignment-handbook",
    {"dataset_mixture", "dataset_mixer", "dataset_splits", "preprocessing_num_workers", "dataset_num_proc"},
    _handbook_command,
    {"loss_type": _trl_loss, "eos_token": lambda value, recipe: _special_tokens({"eos_token": value}, recipe)},
    {
        "train": {"num_train_epochs": "3", "lr_scheduler_type": "linear", "warmup_steps": "0", "beta": "0.1"}
        | {"learning_rate": "1e-6", "max_length": "1024"},
        "sft": {"num_train_epochs": "3", "lr_scheduler_type": "linear", "warmup_steps": "0"},
    },
)

TOOLKITS = (_LLAMA_FACTORY, _AXOLOTL, _OPEN_INSTRUCT, _HANDBOOK)


def implied_objective(toolkit: Toolkit, path: PurePath) -> str | None:
    """The objective of a recipe that has no key for it: alignment-handbook's is that of its script and folder."""
    if toolkit is not _HANDBOOK:
        return None
    folder = _handbook_folder(path)
    return folder if folder in ("orpo", "simpo") else "dpo"
