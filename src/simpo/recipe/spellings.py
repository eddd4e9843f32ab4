"""Older and foreign spellings of keys, mapped to the fields of today."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any

from simpo.coercion import coerce, nearest
from simpo.recipe import foreign
from simpo.recipe.setting import Setting

logger = logging.getLogger(__package__)

# How a key is read that is no field: the name of the field that it sets, or a function from its value (as
# written) and all keys that are given, in either place, to the fields that it sets: none to drop it.
Alias = str | Callable[[Any, Set[str]], Mapping[str, Any]]

# Names of one setting, the newest first. The first that is a field is used, the others are mapped to it.
_SAME = (
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

# Gone from transformers 5 (a run never refuses its folder, weights are always safetensors, TensorBoard's
# folder is an environment variable), or another trainer's name for what simpo always does.
_MEANINGLESS = ("overwrite_output_dir", "save_safetensors", "logging_dir", "padding_free")


def known_spellings(known: Set[str]) -> dict[str, Alias]:
    """How keys are read that are none of the ``known`` ones."""
    spellings: dict[str, Alias] = {key: lambda value, given: {} for key in (*_MEANINGLESS, *foreign.DROPPED)}
    spellings |= {key: partial(_refused, advice) for key, advice in foreign.ADVICE.items()}
    spellings |= {key: partial(foreign.by_value, key) for key in foreign.VALUES}
    spellings |= {"lora_target": foreign.lora_target, "lora_rank": foreign.lora_rank}
    spellings |= {"stage": partial(foreign.stage, known=known)}
    spellings |= {"warmup_ratio": _warmup_ratio, "use_flash_attention_2": _use_flash_attention_2}
    renamed = {key: spellings.get(ours, ours) for key, ours in foreign.RENAMED.items() if ours in {*known, *spellings}}
    spellings = {key: alias for key, alias in (spellings | renamed).items() if key not in known}
    for names in _SAME:
        current = next((name for name in names if name in known), None)
        if current is not None:
            spellings |= {name: current for name in names if name != current}
    return spellings


def _refused(advice: str, value: Any, given: Set[str]) -> dict[str, Any]:
    if not foreign.is_off(value):
        raise ValueError(advice)
    return {}


def _warmup_ratio(value: Any, given: Set[str]) -> dict[str, Any]:
    # In transformers 5 warmup_steps below 1 is a share of the steps; from 1 on it would be a count.
    if coerce(value, float) >= 1:
        raise ValueError(f"{value} is not a share of the steps, which is below 1")
    return {"warmup_steps": value}


def _use_flash_attention_2(value: Any, given: Set[str]) -> dict[str, Any]:
    return {"attn_implementation": "flash_attention_2"} if coerce(value, bool) else {}


def resolve(
    settings: Iterable[Setting],
    known: Set[str],
    spellings: Mapping[str, Alias],
    given: Set[str],
    mistakes: list[str],
) -> dict[str, Setting]:
    """The settings of one place by field, in today's spelling; what is wrong with others is added to ``mistakes``."""
    resolved: dict[str, Setting] = {}
    for written in settings:
        for setting in _respell(written, known, spellings, given, mistakes):
            if setting.key not in resolved:
                resolved[setting.key] = setting
            elif str(setting.value).lower() != str(resolved[setting.key].value).lower():
                mistakes.append(f"{setting.label}: the same as {resolved[setting.key].label}")
    return resolved


def _respell(
    setting: Setting, known: Set[str], spellings: Mapping[str, Alias], given: Set[str], mistakes: list[str]
) -> list[Setting]:
    alias = spellings.get(setting.key)
    if alias is None and setting.key in known:
        return [setting]
    if alias is None:
        mistakes.append(f"{setting.label}: unknown key{_nearest(setting.key, known, spellings)}")
        return []
    if isinstance(alias, str):
        logger.warning("%s is read as %s", setting.label, alias)
        return [dataclasses.replace(setting, key=alias)]
    try:
        replacement = alias(setting.value, given)
        if unknown := [key for key in replacement if key not in known]:
            raise ValueError(f"means {unknown[0]}, which is not a key of this command")
    except ValueError as error:
        mistakes.append(f"{setting.label}: {error}")
        return []
    if replacement:
        read_as = ", ".join(f"{key}: {value}" for key, value in replacement.items())
        logger.warning("%s is read as %s", setting.label, read_as)
    else:
        logger.warning("%s means nothing here and is dropped", setting.label)
    return [dataclasses.replace(setting, key=key, value=value) for key, value in replacement.items()]


def _nearest(key: str, known: Set[str], spellings: Mapping[str, Alias]) -> str:
    """The hint of :func:`~simpo.coercion.nearest`, which names our key where another spelling of it is the nearest."""
    others = {name: alias for name, alias in spellings.items() if isinstance(alias, str)}
    return nearest(key, known | others.keys(), others)
