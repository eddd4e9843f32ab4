"""Translates other toolkits' keys and older spellings of ours, or explains what to write instead.

A key with an exact counterpart is translated and one that cannot affect the result is dropped, each with a warning.
Any other known key is an error that says what to write instead, unless its value turns it off: then it is dropped.
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

# What a key that is not a field stands for: the name of a field, or a function that gets its value (as written) and the
# names of all given keys and returns the fields to set (none drops the key).
Alias = str | Callable[[Any, Set[str]], Mapping[str, Any]]

_KEYS = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text(encoding="utf-8"))
_RENAMED: dict[str, str] = {theirs: ours for ours, names in _KEYS["renamed"].items() for theirs in names}
_VALUES: dict[str, dict[str, Mapping[str, Any]]] = _KEYS["values"]
_ADVICE: dict[str, str] = {key: entry["remedy"] for entry in _KEYS["advice"] for key in entry["keys"]}

# Names for the same setting, newest first. The others are translated to the first one that is a field.
_SYNONYMS = (
    ("model_name_or_path", "model"),
    ("eval_strategy", "evaluation_strategy"),
    ("dtype", "torch_dtype"),
    ("dataset_num_proc", "preprocessing_num_workers"),
    ("max_length", "max_seq_length"),
    ("hub_revision", "hub_model_revision"),
    ("use_cpu", "no_cuda"),
    # transformers 5.23 has both names and lets the new one win, even if the old one is given on the command line.
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)

# Removed in transformers 5 (existing output folders are always accepted, weights are always safetensors, TensorBoard's
# folder is an environment variable), or another trainer's switch for something that simpo always does.
_OBSOLETE = ("overwrite_output_dir", "save_safetensors", "logging_dir", "padding_free")

# Keys that determine the objective: a recipe with any of them is unambiguous.
_DETERMINE_THE_OBJECTIVE = {
    "objective", "loss_type", "stage", "rl", "rlhf_type", "pref_loss", "dpo_loss_type", "trainer_type", "link",
    "gamma", "gamma_beta_ratio", "simpo_gamma", "dpo_gamma_beta_ratio",
}  # fmt: skip
# Keys too common to show that a recipe was written for another toolkit.
_COMMON = {"model", "model_name", "lr", "epochs", "optimizer", "batch_size", "config", "env"}
_OFF = (None, "false", "no", "off", "0", "0.0", "none", "")


def is_off(value: Any) -> bool:
    """Whether a value, as written, turns its key off."""
    return value in ([], {}) or (value is not True and (value.lower() if isinstance(value, str) else value) in _OFF)


# ---- Functions that translate a key; each raises ValueError for a value without a counterpart.


def _by_value(key: str, value: Any, keys: Set[str]) -> Mapping[str, Any]:
    written = str(value).lower()
    if is_off(value):
        return _VALUES[key].get("false", {})
    if written not in _VALUES[key]:
        known = ", ".join(_VALUES[key])
        raise ValueError(f"{value!r} has no counterpart here; these values have one: {known}")
    return _VALUES[key][written]


def _lora_target(value: Any, keys: Set[str]) -> dict[str, Any]:
    """Split LLaMA-Factory's comma-separated list of layers; ``all`` means every linear layer."""
    if isinstance(value, str):
        value = "all-linear" if value == "all" else [name.strip() for name in value.split(",")]
    return {"lora_target_modules": value}


def _lora_rank(value: Any, keys: Set[str]) -> dict[str, Any]:
    """Set the rank, and the ``lora_alpha`` that LLaMA-Factory derives from it by default: twice the rank."""
    theirs = {"finetuning_type", "stage"} & keys and "lora_alpha" not in keys
    return {"lora_r": value} | ({"lora_alpha": str(2 * int(value))} if theirs else {})


def _stage(value: Any, keys: Set[str], known: Set[str]) -> Mapping[str, Any]:
    """Check LLaMA-Factory's ``stage``, which is a command here; its ``dpo`` leaves the loss to ``pref_loss``."""
    command = "train" if "objective" in known else "reward" if "margin" in known else "sft"
    wanted = {"dpo": "train", "kto": "train", "sft": "sft", "rm": "reward"}.get(str(value))
    if wanted != command:
        remedy = f"use simpo {wanted}" if wanted else "simpo does not support this stage"
        raise ValueError(f"{value!r} is not a stage of this command; {remedy}")
    return {"objective": value} if command == "train" and "pref_loss" not in keys else {}


def reject(advice: str, value: Any, keys: Any) -> dict[str, Any]:
    """Raise ValueError with the advice, unless the value turns the key off: then return no fields."""
    if not is_off(value):
        raise ValueError(advice)
    return {}


def _warmup_ratio(value: Any, keys: Set[str]) -> dict[str, Any]:
    # In transformers 5, warmup_steps is a fraction of all steps if it is below 1, and a number of steps otherwise.
    if coerce(value, float) >= 1:
        raise ValueError(f"{value} is not a fraction of the steps; it must be below 1")
    return {"warmup_steps": value}


def _use_flash_attention_2(value: Any, keys: Set[str]) -> dict[str, Any]:
    return {"attn_implementation": "flash_attention_2"} if coerce(value, bool) else {}


def known_spellings(known: Set[str]) -> dict[str, Alias]:
    """Return what keys that are not ``known`` stand for; other toolkits' keys are only accepted for training."""
    spellings: dict[str, Alias] = {"warmup_ratio": _warmup_ratio, "use_flash_attention_2": _use_flash_attention_2}
    if "learning_rate" in known:
        spellings |= {key: lambda value, keys: {} for key in (*_OBSOLETE, *_KEYS["dropped"])}
        spellings |= {key: partial(reject, advice) for key, advice in _ADVICE.items()}
        spellings |= {key: partial(_by_value, key) for key in _VALUES}
        spellings |= {"lora_target": _lora_target, "lora_rank": _lora_rank, "stage": partial(_stage, known=known)}
        spellings |= {key: spellings.get(ours, ours) for key, ours in _RENAMED.items() if ours in {*known, *spellings}}
    spellings = {key: alias for key, alias in spellings.items() if key not in known}
    for names in _SYNONYMS:
        current = next((name for name in names if name in known), None)
        if current is not None:
            spellings |= {name: current for name in names if name != current}
    return spellings


# ---- Translating settings.


def resolve(
    settings: Iterable[Setting],
    known: Set[str],
    spellings: Mapping[str, Alias],
    keys: Set[str],
    mistakes: list[str],
) -> dict[str, Setting]:
    """Translate the settings from one source and return them by field name; errors are appended to ``mistakes``."""
    resolved: dict[str, Setting] = {}
    for written in settings:
        for setting in _translate_key(written, known, spellings, keys, mistakes):
            if setting.key not in resolved:
                resolved[setting.key] = setting
            elif str(setting.value).lower() != str(resolved[setting.key].value).lower():
                mistakes.append(f"{setting.label}: means the same as {resolved[setting.key].label}; keep one of them")
    return resolved


def _translate_key(
    setting: Setting, known: Set[str], spellings: Mapping[str, Alias], keys: Set[str], mistakes: list[str]
) -> list[Setting]:
    alias = spellings.get(setting.key)
    if alias is None and setting.key in known:
        return [setting]
    if alias is None:
        # If the closest key is another spelling of one of ours, suggest ours.
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


# ---- What the recipe as a whole implies.


def objective_mistakes(keys: Mapping[str, Any]) -> list[str]:
    """Return an error, as a list, if a recipe names no objective but has keys of other toolkits, which often train DPO.

    ``keys`` maps all given keys to their values.
    """
    theirs = {*_RENAMED, *_VALUES, *_ADVICE, *_KEYS["dropped"], "lora_target", "lora_rank"} - _COMMON
    key = next((key for key, value in keys.items() if key in theirs and not is_off(value)), None)
    if key is None or _DETERMINE_THE_OBJECTIVE & keys.keys():
        return []
    return [f"objective: not given, and {key} is another toolkit's key; set objective: dpo, or whichever you want"]


def paper_settings(file: Set[str], keys: Set[str]) -> dict[str, Any]:
    """Return settings that are hard-coded in the paper's code, if the keys of a ``file`` show one of its recipes.

    Those combine SimPO's ``gamma_beta_ratio`` with the alignment-handbook's older data keys. A recipe written for this
    project names its objective.
    """
    older = {"preprocessing_num_workers", "evaluation_strategy", "trainer_type"}
    if not {"gamma_beta_ratio", "dataset_mixer"} <= file or not older & file or "objective" in file:
        return {}
    implied = {"paper_tokenization": "true", "truncation": "paper", "auto_insert_empty_system_msg": "true"}
    return {key: value for key, value in implied.items() if key not in keys}
