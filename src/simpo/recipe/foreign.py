"""Keys of other toolkits (TRL, LLaMA-Factory, Axolotl, open-instruct, OpenRLHF, alignment-handbook).

A key with an exact counterpart is translated, one that cannot affect the result is dropped, both with a notice. Every
other known key is an error that names what to write instead; if its value switches it off, it is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

# Another toolkit's key: ours, of the same meaning and with the same values.
RENAMED = {
    **dict.fromkeys(("model", "model_name", "base_model", "pretrain"), "model_name_or_path"),
    **dict.fromkeys(("pref_beta", "rl_beta", "dpo_beta"), "beta"),
    **dict.fromkeys(("dpo_label_smoothing",), "label_smoothing"),
    **dict.fromkeys(("cutoff_len", "sequence_len", "max_len"), "max_length"),
    **dict.fromkeys(("micro_batch_size", "micro_train_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("num_epochs", "max_epochs", "epochs"), "num_train_epochs"),
    **dict.fromkeys(("kto_desirable_weight", "kto_chosen_weight"), "desirable_weight"),
    **dict.fromkeys(("kto_undesirable_weight", "kto_rejected_weight"), "undesirable_weight"),
    **dict.fromkeys(("dataset_path", "data_path", "train_file"), "dataset_name"),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "double_quantization"), "use_bnb_nested_quant"),
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
    "wandb_name": "run_name",
    "load_best_model": "load_best_model_at_end",
    "enable_liger_kernel": "use_liger_kernel",
    "quantization_type": "bnb_4bit_quant_type",
    "dataset_processes": "dataset_num_proc",
}

# Keys that cannot affect the result here: caches, plots, and how other trainers lay out or pad their batches.
DROPPED = (
    *("overwrite_cache", "dataset_prepared_path", "plot_loss", "strict", "lora_task_type", "use_logits_to_keep"),
    *("sample_packing", "eval_sample_packing", "pad_to_sequence_len", "packing_samples", "no_remove_unused_columns"),
    *("model_type", "tokenizer_type", "label_pad_token_id", "padding_value"),
)

_DPO, _SIMPO, _ORPO, _KTO = ({"objective": name} for name in ("dpo", "simpo", "orpo", "kto"))
_IPO = {"objective": "ipo", "length_normalized": "true"}
_FLASH = {"attn_implementation": "flash_attention_2"}
# Another toolkit's key: what its values mean here.
VALUES: dict[str, dict[str, Mapping[str, Any]]] = {
    "rl": {"dpo": _DPO, "simpo": _SIMPO, "orpo": _ORPO, "kto": _KTO, "ipo": _IPO},
    "pref_loss": {"sigmoid": _DPO, "simpo": _SIMPO, "orpo": _ORPO, "ipo": _IPO},
    "dpo_loss_type": {"dpo": _DPO, "simpo": _SIMPO, "dpo_norm": {"objective": "dpo_norm"}},
    "trainer_type": {"dpo": _DPO, "simpo": _SIMPO, "orpo": _ORPO, "kto": _KTO},
    "finetuning_type": {"lora": {"use_peft": "true"}, "full": {}},
    "adapter": {"lora": {"use_peft": "true"}, "qlora": {"use_peft": "true", "load_in_4bit": "true"}},
    "lora_target_linear": {"true": {"lora_target_modules": "all-linear"}, "false": {}},
    "quantization_bit": {"4": {"load_in_4bit": "true"}},
    "f_divergence_type": {"reverse_kl": {}},
    "flash_attention": {"true": _FLASH, "false": {}},
    "use_flash_attn": {"true": _FLASH, "false": {}},
    "flash_attn": {
        **{"fa2": _FLASH, "true": _FLASH, "auto": {}, "false": {}},
        **{"sdpa": {"attn_implementation": "sdpa"}, "disabled": {"attn_implementation": "eager"}},
    },
}

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
    "max_samples": "write a slice as the split, dataset_train_split: 'train[:1000]'",
    "max_completion_length": "responses are never cut separately; leave it out, max_length bounds prompt and response",
    "special_tokens": "set them in the model's tokenizer; leave it out",
    "tokenizer_name_or_path": "the tokenizer is the model's own; save it in the model's folder and leave this out",
    "image_max_pixels": "only text is trained; leave it out",
    "video_max_pixels": "only text is trained; leave it out",
    "load_in_8bit": "write load_in_4bit: true, or leave it out; a base model in 8 bits is not supported",
    "pure_bf16": "write dtype: bfloat16 and bf16: true",
    "config": "name the recipe without an option, before all others: RECIPE.yaml --key value",
    "env": "set environment variables in the shell; leave it out",
    "use_dora": "only plain LoRA is trained; leave it out",
    "streaming": "data sets are read as a whole; leave it out",
    "generate_during_eval": "write eval_generations: true",
}
# Keys that only objectives other than SimPO have, and keys of which one says the objective.
_SUGGEST_ANOTHER = (
    *("ref_model", "ref_pretrain", "reference_model_path", "sync_ref_model", "force_use_ref_model", "reference_free"),
    *("cpo_alpha", "rpo_alpha", "nll_loss_coef", "f_divergence_type", "orpo_alpha", "dpo_beta", "dpo_label_smoothing"),
)
_SAY_THE_OBJECTIVE = {
    *("objective", "loss_type", "stage", "rl", "pref_loss", "dpo_loss_type", "trainer_type", "link"),
    *("gamma", "gamma_beta_ratio", "simpo_gamma", "dpo_gamma_beta_ratio"),
}
_OFF = (None, "false", "no", "off", "0", "0.0", "none", "")


def is_off(value: Any) -> bool:
    """Whether a value, as written, switches its key off."""
    return value in ([], {}) or (value is not True and (value.lower() if isinstance(value, str) else value) in _OFF)


def by_value(key: str, value: Any) -> Mapping[str, Any]:
    """What a key of :data:`VALUES` means with ``value``.

    Raises:
        ValueError: the value has no counterpart.
    """
    written = str(value).lower()
    if is_off(value):
        return VALUES[key].get("false", {})
    if written not in VALUES[key]:
        known = ", ".join(VALUES[key])
        raise ValueError(f"{value!r} has no counterpart here (of its values, {known} have one)")
    return VALUES[key][written]


def lora_target(value: Any, given: Set[str]) -> dict[str, Any]:
    """LLaMA-Factory's list of layers in one text; ``all`` is every linear layer."""
    if isinstance(value, str):
        value = "all-linear" if value == "all" else [name.strip() for name in value.split(",")]
    return {"lora_target_modules": value}


def lora_rank(value: Any, given: Set[str]) -> dict[str, Any]:
    """LLaMA-Factory's ``lora_alpha`` is twice the rank where it is not given."""
    theirs = {"finetuning_type", "stage"} & given and "lora_alpha" not in given
    return {"lora_r": value} | ({"lora_alpha": str(2 * int(value))} if theirs else {})


def stage(value: Any, given: Set[str], known: Set[str]) -> Mapping[str, Any]:
    """LLaMA-Factory's kind of training, which is a command here; its ``dpo`` leaves the loss to ``pref_loss``.

    Raises:
        ValueError: another command does that, or none.
    """
    command = "train" if "objective" in known else "reward" if "margin" in known else "sft"
    wanted = {"dpo": "train", "kto": "train", "sft": "sft", "rm": "reward"}.get(str(value))
    if wanted != command:
        remedy = f"start it with simpo {wanted}" if wanted else "simpo has no such kind of training"
        raise ValueError(f"{value!r} is not what this command trains; {remedy}")
    return {"objective": value} if command == "train" and "pref_loss" not in given else {}


def unclear_objective(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with recipes whose keys, ``given`` with their values, are of an objective that they do not name."""
    if not _SAY_THE_OBJECTIVE & given.keys():
        for key in (key for key in _SUGGEST_ANOTHER if not is_off(given.get(key))):
            yield f"objective: not given, and {key} is not SimPO's; write objective: dpo, or which one is meant"
            return


def paper_settings(file: Set[str], given: Set[str]) -> dict[str, Any]:
    """What the paper's code does without a key, if the keys of a ``file`` are those of the paper's own recipes.

    Those have SimPO's ``gamma_beta_ratio`` next to the alignment-handbook's older keys for data. A recipe that is
    written for this project names its objective.
    """
    older = {"preprocessing_num_workers", "evaluation_strategy", "trainer_type"}
    if not {"gamma_beta_ratio", "dataset_mixer"} <= file or not older & file or "objective" in file:
        return {}
    implied = {"paper_tokenization": "true", "truncation": "paper", "auto_insert_empty_system_msg": "true"}
    return {key: value for key, value in implied.items() if key not in given}
