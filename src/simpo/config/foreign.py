"""Keys of other toolkits and older spellings of ours: translated, or named in the error.

A key with an exact counterpart is translated, one that cannot affect the result is dropped, both with a notice. Every
other known key is an error that names what to write instead; if its value switches it off, it is dropped.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from simpo.config.fields import Setting, coerce, nearest

logger = logging.getLogger(__package__)

# How a key that is not a field is read: the name of the field that it sets, or a function from its value (as written)
# and all keys that are given, in either place, to the fields that it sets: none to drop the key.
Alias = str | Callable[[Any, Set[str]], Mapping[str, Any]]

_KEYS = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text(encoding="utf-8"))
_RENAMED: dict[str, str] = {theirs: ours for ours, names in _KEYS["renamed"].items() for theirs in names}
_VALUES: dict[str, dict[str, Mapping[str, Any]]] = _KEYS["values"]
_ADVICE: dict[str, str] = {key: entry["remedy"] for entry in _KEYS["advice"] for key in entry["keys"]}


# Names of one setting, the newest first. The first that is a field is used, the others are translated to it.
_SAME = (
    ("model_name_or_path", "model"),
    ("eval_strategy", "evaluation_strategy"),
    ("dtype", "torch_dtype"),
    ("dataset_num_proc", "preprocessing_num_workers"),
    ("max_length", "max_seq_length"),
    ("hub_revision", "hub_model_revision"),
    ("use_cpu", "no_cuda"),
    # transformers 5.23 has both pairs and lets the new name win, even over the old one on the command line.
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)

# Removed from transformers 5 (a run never refuses its folder, weights are always safetensors, TensorBoard's folder is
# an environment variable), or another trainer's name for what simpo always does.
_MEANINGLESS = ("overwrite_output_dir", "save_safetensors", "logging_dir", "padding_free")

# Keys that determine the objective: a recipe with one of them is clear.
_DETERMINE_THE_OBJECTIVE = {
    "objective", "loss_type", "stage", "rl", "rlhf_type", "pref_loss", "dpo_loss_type", "trainer_type", "link",
    "gamma", "gamma_beta_ratio", "simpo_gamma", "dpo_gamma_beta_ratio",
}  # fmt: skip
# Keys that are too common to show that a recipe belongs to another toolkit.
_COMMON = {"model", "model_name", "lr", "epochs", "optimizer", "batch_size", "config", "env"}
_OFF = (None, "false", "no", "off", "0", "0.0", "none", "")


def is_off(value: Any) -> bool:
    """Whether a value, as written, switches its key off."""
    return value in ([], {}) or (value is not True and (value.lower() if isinstance(value, str) else value) in _OFF)


# ---- Keys that are translated by a function; each raises ValueError where a value has no counterpart.


def _by_value(key: str, value: Any, keys: Set[str]) -> Mapping[str, Any]:
    written = str(value).lower()
    if is_off(value):
        return _VALUES[key].get("false", {})
    if written not in _VALUES[key]:
        known = ", ".join(_VALUES[key])
        raise ValueError(f"{value!r} has no counterpart here (of its values, {known} have one)")
    return _VALUES[key][written]


def _lora_target(value: Any, keys: Set[str]) -> dict[str, Any]:
    """LLaMA-Factory writes the list of layers as one text; ``all`` is every linear layer."""
    if isinstance(value, str):
        value = "all-linear" if value == "all" else [name.strip() for name in value.split(",")]
    return {"lora_target_modules": value}


def _lora_rank(value: Any, keys: Set[str]) -> dict[str, Any]:
    """LLaMA-Factory's ``lora_alpha`` is twice the rank where it is not given."""
    theirs = {"finetuning_type", "stage"} & keys and "lora_alpha" not in keys
    return {"lora_r": value} | ({"lora_alpha": str(2 * int(value))} if theirs else {})


def _stage(value: Any, keys: Set[str], known: Set[str]) -> Mapping[str, Any]:
    """LLaMA-Factory's kind of training, which is a command here; its ``dpo`` leaves the loss to ``pref_loss``."""
    command = "train" if "objective" in known else "reward" if "margin" in known else "sft"
    wanted = {"dpo": "train", "kto": "train", "sft": "sft", "rm": "reward"}.get(str(value))
    if wanted != command:
        remedy = f"start it with simpo {wanted}" if wanted else "simpo has no such kind of training"
        raise ValueError(f"{value!r} is not trained by this command; {remedy}")
    return {"objective": value} if command == "train" and "pref_loss" not in keys else {}


def reject(advice: str, value: Any, keys: Any) -> dict[str, Any]:
    """No keys if the value switches its key off; otherwise an error with the advice."""
    if not is_off(value):
        raise ValueError(advice)
    return {}


def _warmup_ratio(value: Any, keys: Set[str]) -> dict[str, Any]:
    # In transformers 5 warmup_steps below 1 is a share of the steps; from 1 on it would be a count.
    if coerce(value, float) >= 1:
        raise ValueError(f"{value} is not a share of the steps, which is below 1")
    return {"warmup_steps": value}


def _use_flash_attention_2(value: Any, keys: Set[str]) -> dict[str, Any]:
    return {"attn_implementation": "flash_attention_2"} if coerce(value, bool) else {}


def known_spellings(known: Set[str]) -> dict[str, Alias]:
    """The meaning of keys that are not among the ``known`` ones; those of other toolkits apply to training only."""
    spellings: dict[str, Alias] = {"warmup_ratio": _warmup_ratio, "use_flash_attention_2": _use_flash_attention_2}
    if "learning_rate" in known:
        spellings |= {key: lambda value, keys: {} for key in (*_MEANINGLESS, *_KEYS["dropped"])}
        spellings |= {key: partial(reject, advice) for key, advice in _ADVICE.items()}
        spellings |= {key: partial(_by_value, key) for key in _VALUES}
        spellings |= {"lora_target": _lora_target, "lora_rank": _lora_rank, "stage": partial(_stage, known=known)}
        spellings |= {key: spellings.get(ours, ours) for key, ours in _RENAMED.items() if ours in {*known, *spellings}}
    spellings = {key: alias for key, alias in spellings.items() if key not in known}
    for names in _SAME:
        current = next((name for name in names if name in known), None)
        if current is not None:
            spellings |= {name: current for name in names if name != current}
    return spellings


# ---- Translation of settings.


def resolve(
    settings: Iterable[Setting],
    known: Set[str],
    spellings: Mapping[str, Alias],
    keys: Set[str],
    mistakes: list[str],
) -> dict[str, Setting]:
    """The settings of one place by field, with foreign keys translated; errors are added to ``mistakes``."""
    resolved: dict[str, Setting] = {}
    for written in settings:
        for setting in _translate_key(written, known, spellings, keys, mistakes):
            if setting.key not in resolved:
                resolved[setting.key] = setting
            elif str(setting.value).lower() != str(resolved[setting.key].value).lower():
                mistakes.append(f"{setting.label}: the same as {resolved[setting.key].label}")
    return resolved


def _translate_key(
    setting: Setting, known: Set[str], spellings: Mapping[str, Alias], keys: Set[str], mistakes: list[str]
) -> list[Setting]:
    alias = spellings.get(setting.key)
    if alias is None and setting.key in known:
        return [setting]
    if alias is None:
        # If the nearest key is another spelling of one of ours, suggest ours.
        others = {name: alias for name, alias in spellings.items() if isinstance(alias, str)}
        mistakes.append(f"{setting.label}: unknown key{nearest(setting.key, known | others.keys(), others)}")
        return []
    if isinstance(alias, str):
        logger.warning("%s is read as %s", setting.label, alias)
        return [dataclasses.replace(setting, key=alias)]
    try:
        replacement = alias(setting.value, keys)
        if unknown := [key for key in replacement if key not in known]:
            raise ValueError(f"means {unknown[0]}, which is not a key of this command")
    except ValueError as error:
        mistakes.append(f"{setting.label}: {error}")
        return []
    if replacement:
        read_as = ", ".join(f"{key}: {value}" for key, value in replacement.items())
        logger.warning("%s is read as %s", setting.label, read_as)
    else:
        logger.warning("%s has no effect here and is dropped", setting.label)
    return [dataclasses.replace(setting, key=key, value=value) for key, value in replacement.items()]


# ---- What a recipe as a whole implies.


def objective_mistakes(keys: Mapping[str, Any]) -> list[str]:
    """The error of a recipe that names no objective and has keys of toolkits that train DPO and others.

    ``keys`` are all keys with their values.
    """
    theirs = {*_RENAMED, *_VALUES, *_ADVICE, *_KEYS["dropped"], "lora_target", "lora_rank"} - _COMMON
    found = next((key for key, value in keys.items() if key in theirs and not is_off(value)), None)
    if found is None or _DETERMINE_THE_OBJECTIVE & keys.keys():
        return []
    return [f"objective: not given, and {found} is another toolkit's key; write objective: dpo, or the one you want"]


def paper_settings(file: Set[str], keys: Set[str]) -> dict[str, Any]:
    """Settings that the paper's code uses without a key, if a ``file`` has the keys of the paper's own recipes.

    Those have SimPO's ``gamma_beta_ratio`` next to the alignment-handbook's older keys for data. A recipe that is
    written for this project names its objective.
    """
    older = {"preprocessing_num_workers", "evaluation_strategy", "trainer_type"}
    if not {"gamma_beta_ratio", "dataset_mixer"} <= file or not older & file or "objective" in file:
        return {}
    implied = {"paper_tokenization": "true", "truncation": "paper", "auto_insert_empty_system_msg": "true"}
    return {key: value for key, value in implied.items() if key not in keys}
