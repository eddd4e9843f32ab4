"""Keys of other toolkits and older spellings of ours: translated, or named in the error.

A key with an exact counterpart is translated, one that cannot affect the result is dropped, both with a notice. Every
other known key is an error that names what to write instead; if its value switches it off, it is dropped.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any

from simpo.config.fields import Setting, coerce, nearest

logger = logging.getLogger(__package__)

# How a key that is not a field is read: the name of the field that it sets, or a function from its value (as written)
# and all keys that are given, in either place, to the fields that it sets: none to drop the key.
Alias = str | Callable[[Any, Set[str]], Mapping[str, Any]]

# Another toolkit's key: ours, of the same meaning and with the same values.
RENAMED = {
    **dict.fromkeys(("model", "model_name", "base_model", "pretrain"), "model_name_or_path"),
    **dict.fromkeys(("pref_beta", "rl_beta", "dpo_beta"), "beta"),
    **dict.fromkeys(("cutoff_len", "sequence_len", "max_len"), "max_length"),
    **dict.fromkeys(("micro_batch_size", "micro_train_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("num_epochs", "max_epochs", "epochs"), "num_train_epochs"),
    **dict.fromkeys(("kto_desirable_weight", "kto_chosen_weight"), "desirable_weight"),
    **dict.fromkeys(("kto_undesirable_weight", "kto_rejected_weight"), "undesirable_weight"),
    **dict.fromkeys(("dataset_path", "data_path", "train_file"), "dataset_name"),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "double_quantization"), "use_bnb_nested_quant"),
    **dict.fromkeys(("keep_last_n_checkpoints", "max_ckpt_num"), "save_total_limit"),
    **dict.fromkeys(("wandb_name", "wandb_run_name"), "run_name"),
    "dpo_label_smoothing": "label_smoothing",
    "simpo_gamma": "gamma",
    "dpo_gamma_beta_ratio": "gamma_beta_ratio",
    "orpo_alpha": "lam",
    "pref_ftx": "sft_weight",
    "max_prompt_len": "max_prompt_length",
    "eval_batch_size": "per_device_eval_batch_size",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "lr": "learning_rate",
    "l2": "weight_decay",
    "lr_warmup_ratio": "warmup_ratio",
    "save_path": "output_dir",
    "max_norm": "max_grad_norm",
    "use_lora": "use_peft",
    "target_modules": "lora_target_modules",
    "load_best_model": "load_best_model_at_end",
    "enable_liger_kernel": "use_liger_kernel",
    "quantization_type": "bnb_4bit_quant_type",
    "dataset_processes": "dataset_num_proc",
}

# Keys that cannot affect the result here: caches, plots, and how other trainers lay out or pad their batches.
DROPPED = (
    "overwrite_cache", "dataset_prepared_path", "plot_loss", "strict", "lora_task_type", "use_logits_to_keep",
    "sample_packing", "eval_sample_packing", "pad_to_sequence_len", "packing_samples", "no_remove_unused_columns",
    "model_type", "tokenizer_type", "label_pad_token_id", "padding_value", "use_slow_tokenizer", "overlap_comm",
    "packing", "packing_strategy", "eval_packing", "padding_side", "try_launch_beaker_eval_jobs",
    "hf_metadata_dataset", "dataset_mix_dir", "eval_table_size", "eval_table_max_new_tokens",
)  # fmt: skip

_DPO, _SIMPO, _ORPO, _KTO = ({"objective": name} for name in ("dpo", "simpo", "orpo", "kto"))
_IPO = {"objective": "ipo", "length_normalized": "true"}
_FLASH = {"attn_implementation": "flash_attention_2"}

# Another toolkit's key: what its values mean here.
VALUES: dict[str, dict[str, Mapping[str, Any]]] = {
    **{key: {"dpo": _DPO, "simpo": _SIMPO, "orpo": _ORPO, "kto": _KTO, "ipo": _IPO} for key in ("rl", "rlhf_type")},
    "pref_loss": {"sigmoid": _DPO, "simpo": _SIMPO, "orpo": _ORPO, "ipo": _IPO},
    "dpo_loss_type": {"dpo": _DPO, "simpo": _SIMPO, "dpo_norm": {"objective": "dpo_norm"}},
    "trainer_type": {"dpo": _DPO, "simpo": _SIMPO, "orpo": _ORPO, "kto": _KTO},
    **{key: {"lora": {"use_peft": "true"}, "full": {}} for key in ("finetuning_type", "train_type", "tuner_type")},
    "adapter": {"lora": {"use_peft": "true"}, "qlora": {"use_peft": "true", "load_in_4bit": "true"}},
    "use_qlora": {"true": {"use_peft": "true", "load_in_4bit": "true"}, "false": {}},
    "lora_target_linear": {"true": {"lora_target_modules": "all-linear"}, "false": {}},
    "quantization_bit": {"4": {"load_in_4bit": "true"}},
    "assistant_only_loss": {"true": {}},
    "train_on_inputs": {"false": {}},
    "mask_prompt": {"true": {}},
    "f_divergence_type": {"reverse_kl": {}},
    "flash_attention": {"true": _FLASH, "false": {}},
    "use_flash_attn": {"true": _FLASH, "false": {}},
    "flash_attn": {
        "fa2": _FLASH, "true": _FLASH, "auto": {}, "false": {},
        "sdpa": {"attn_implementation": "sdpa"}, "disabled": {"attn_implementation": "eager"},
    },
}  # fmt: skip

_DATA = "write dataset_name (a hub id, a file or a folder), or dataset_mixture for several data sets"
_HELD_OUT = "write eval_dataset_name with held-out rows, or dataset_mixture with a test_split_size"
_NLL = (
    "write sft_weight, the weight of the chosen response's average negative log-probability (there the average is "
    "over the tokens of a whole batch)"
)
_REFERENCE = "the reference is always the model that training starts from; leave it out"
_TEMPLATE = "the tokenizer's own chat template is used; leave it out, or write chat_template (a template or a file)"
_PER_EPOCH = "write a number of steps, or a share of all steps below 1, as {0}_steps, with {0}_strategy: steps"

# Keys without an exact counterpart: what to do instead.
ADVICE = {
    **dict.fromkeys(("dataset", "datasets", "dataset_mixer_list", "train_dataset", "dataset_dir"), _DATA),
    **dict.fromkeys(("eval_dataset", "val_size", "val_set_size", "test_datasets"), _HELD_OUT),
    **dict.fromkeys(("cpo_alpha", "rpo_alpha", "nll_loss_coef"), _NLL),
    **dict.fromkeys(("ref_model", "ref_model_adapters", "ref_pretrain", "reference_model_path"), _REFERENCE),
    **dict.fromkeys(("sync_ref_model", "reference_free", "force_use_ref_model"), _REFERENCE),
    **dict.fromkeys(("template", "apply_chat_template", "default_system"), _TEMPLATE),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_watch", "wandb_log_model", "use_wandb"),
        "write report_to: wandb, and set wandb's environment variables (WANDB_PROJECT, ...)",
    ),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), "write the adapter as model_name_or_path"),
    **dict.fromkeys(
        ("train_batch_size", "batch_size"),
        "write per_device_train_batch_size and "
        "gradient_accumulation_steps; a step has their product, times the number of processes",
    ),
    "evals_per_epoch": _PER_EPOCH.format("eval"),
    "saves_per_epoch": _PER_EPOCH.format("save"),
    **dict.fromkeys(
        ("max_samples", "max_train_samples"), "write a slice as the split, dataset_train_split: 'train[:1000]'"
    ),
    "max_completion_length": "responses are never cut separately; leave it out, max_length bounds prompt and response",
    **dict.fromkeys(
        ("special_tokens", "eos_token", "pad_token", "add_bos", "tokenizer_name", "tokenizer_name_or_path"),
        "the tokenizer is the model's own: change it in the model's folder, and leave this out",
    ),
    "image_max_pixels": "set it in the model's own processor (preprocessor_config.json), and leave it out here",
    "video_max_pixels": "only text and images are trained; leave it out",
    "load_in_8bit": "write load_in_4bit: true, or leave it out; a base model in 8 bits is not supported",
    "pure_bf16": "write dtype: bfloat16 and bf16: true",
    "config": "name the recipe without an option, before all others: RECIPE.yaml --key value",
    "env": "set environment variables in the shell; leave it out",
    "use_dora": "only plain LoRA is trained; leave it out",
    **dict.fromkeys(("streaming", "dataset_streaming"), "data sets are read as a whole; leave it out"),
    **dict.fromkeys(
        ("chosen_key", "rejected_key", "prompt_key", "input_key", "output_key", "field_messages", "dataset_kwargs"),
        "write column_mapping, e.g. {chosen: better, rejected: worse}, where the data has other names for its columns",
    ),
    **dict.fromkeys(
        ("dataset_probs", "split_dataset_ratio", "interleave_probs", "mix_strategy"),
        "write dataset_mixture with weights",
    ),
    **dict.fromkeys(
        ("zero_stage", "adam_offload"), "write deepspeed with a configuration file, or give one to accelerate launch"
    ),
    "with_tracking": "write report_to: wandb (or another tracker), or leave it out",
    "checkpointing_steps": "write save_steps with save_strategy: steps, or save_strategy: epoch",
    "adam_betas": "write adam_beta1 and adam_beta2",
    "kl_loss_coef": "write kl_weight, the weight of KL(policy || start model); leave it out where it is 0",
    "aux_loss_coef": "write output_router_logits and router_aux_loss_coef in the model's config.json; leave it out",
    "ipo": "write objective: ipo with tau, which is beta there",
    "early_stopping_patience": "a run ends after num_train_epochs or max_steps; load_best_model_at_end keeps the best",
    "group_by_length": "micro-batches are balanced by tokens in any order of the rows; leave it out",
    **dict.fromkeys(("is_encoder_decoder", "lora_fan_in_fan_out"), "not supported; leave it out"),
    **dict.fromkeys(
        ("xformers_attention", "sdp_attention", "eager_attention"),
        "write attn_implementation: flash_attention_2, sdpa or eager",
    ),
    "generate_during_eval": "write eval_generations: true",
}


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
        return VALUES[key].get("false", {})
    if written not in VALUES[key]:
        known = ", ".join(VALUES[key])
        raise ValueError(f"{value!r} has no counterpart here (of its values, {known} have one)")
    return VALUES[key][written]


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
    return _FLASH if coerce(value, bool) else {}


def known_spellings(known: Set[str]) -> dict[str, Alias]:
    """The meaning of keys that are not among the ``known`` ones; those of other toolkits apply to training only."""
    spellings: dict[str, Alias] = {"warmup_ratio": _warmup_ratio, "use_flash_attention_2": _use_flash_attention_2}
    if "learning_rate" in known:
        spellings |= {key: lambda value, keys: {} for key in (*_MEANINGLESS, *DROPPED)}
        spellings |= {key: partial(reject, advice) for key, advice in ADVICE.items()}
        spellings |= {key: partial(_by_value, key) for key in VALUES}
        spellings |= {"lora_target": _lora_target, "lora_rank": _lora_rank, "stage": partial(_stage, known=known)}
        spellings |= {key: spellings.get(ours, ours) for key, ours in RENAMED.items() if ours in {*known, *spellings}}
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
    theirs = {*RENAMED, *VALUES, *ADVICE, *DROPPED, "lora_target", "lora_rank"} - _COMMON
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
