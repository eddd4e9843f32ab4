"""Merges an adapter and its base model into an ordinary model."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import PROCESSOR_NAME

from simpo.errors import SimpoError, third_party
from simpo.models.adapters import CANNOT_MERGE, changes_tied_weights, find_adapter
from simpo.models.checkpoint import display_name
from simpo.models.loading import check_folder, load_model, load_processor, load_tokenizer, round_weights
from simpo.models.reward import load_reward_model
from simpo.models.settings import ModelArguments
from simpo.runs.files import staged_folder


def write_merged(arguments: ModelArguments, folder: Path) -> None:
    """Merge an adapter into its base model and write the result, with tokenizer, template and card, atomically.

    Without ``save_dtype``, the weights keep the dtype of the base model's files.
    """
    name = arguments.model_name_or_path
    if folder.exists():
        raise SimpoError(f"output_dir: {folder} already exists; choose a new folder")
    check_folder(name)
    unrounded = "auto" if arguments.save_dtype is None else "float32"
    arguments = dataclasses.replace(arguments, dtype=arguments.dtype or unrounded)
    adapter = find_adapter(name, arguments.model_revision)
    reward = adapter is not None and adapter.task_type == "SEQ_CLS"
    model: Any = load_reward_model(arguments) if reward else load_model(arguments)
    if not isinstance(model, PeftModel):
        raise SimpoError(f"{name} is not an adapter: it has no adapter_config.json, so there is nothing to merge")
    load: Any = load_processor if (Path(name) / PROCESSOR_NAME).is_file() else load_tokenizer
    processing = load(arguments)
    base = str(model.peft_config["default"].base_model_name_or_path)
    merged = merge(model)
    with staged_folder(folder) as staging:
        merged.save_pretrained(staging)
        if arguments.save_dtype is not None:
            round_weights(staging, arguments.save_dtype)
        processing.save_pretrained(staging)
        _card(name, base, folder.resolve().name).save(staging / "README.md")


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge the adapter into the base model's weights, rounding only once to their dtype, and return that model."""
    if changes_tied_weights(model):
        raise SimpoError(CANNOT_MERGE)
    return model.merge_and_unload()  # type: ignore[operator]


def _card(adapter: str, base: str, title: str) -> ModelCard:
    """Write a card that says what was merged, followed by the adapter's own card if it has one."""
    path = Path(adapter) / "README.md"
    with third_party(str(path)):
        before = ModelCard(path.read_text(encoding="utf-8")) if path.is_file() else None
    data = ModelCardData() if before is None else before.data
    data.library_name, data.pipeline_tag = "transformers", data.pipeline_tag or "text-generation"
    data.base_model = None if Path(base).exists() else base
    summary = f"`{display_name(adapter)}` merged into `{display_name(base)}`, with simpo {version('simpo')}."
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{summary}\n{'' if before is None else before.text}")
