"""The identity of a training run: all that determines its result, as a flat mapping that can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from simpo.data.images import DIGESTS
from simpo.data.prompts import columns_identity
from simpo.models.checkpoint import model_digest
from simpo.models.settings import ModelArguments
from simpo.runs import manifest
from simpo.runs.manifest import file_digest
from simpo.training.batches import BETA, CONTENT, LABEL_PROBABILITY, LEVELS, MARGIN, WEIGHT
from simpo.training.rollouts import prompts_from_rows
from simpo.training.settings import DataArguments

# Keys of a configuration that change what is shown, stored or kept of a run, but not what it computes.
_NO_INFLUENCE = {
    *("accept_changes", "guard"),
    *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("image_folder", "dataset_num_proc", "ddp_timeout", "disable_tqdm", "do_eval", "do_predict", "do_train"),
    *("log_level", "log_level_replica", "log_on_each_node", "output_dir"),
    *("per_device_eval_batch_size", "per_device_train_batch_size"),  # the rows per step count
    *("project", "reference_cache", "report_to", "resume_from_checkpoint", "run_name", "trackio_space_id"),
}
_NO_INFLUENCE_PREFIXES = ("hub_", "logging_", "push_to_hub", "save_")

Identity = dict[str, str | None]


def training_identity(
    model: ModelArguments, data: DataArguments, config: Any, train: Dataset, held_out: Dataset | None
) -> Identity:
    """Start model, rows in their order, and every setting that influences training.

    Data and models count by their contents, not by where they come from; a hub model by its name and revision.
    """
    found: Identity = {"model": model_digest(model), "dtype": model.dtype, "chat_template": data.chat_template}
    found |= {key: str(value) for key, value in (model.new_adapter | model.quantization).items()}
    if model.save_dtype is not None:
        found["save_dtype"] = model.save_dtype
    found["data/train"] = rows_digest(train)
    found["data/eval"] = None if held_out is None else rows_digest(held_out)
    checkpoint = checkpoint_from_recipe(config)
    found["resume_from_checkpoint"] = None if checkpoint is None else file_digest(Path(checkpoint) / manifest.FILE_NAME)
    return found | settings_identity(config)


def settings_identity(config: Any) -> Identity:
    """Every setting of a configuration that influences training."""
    settings = config.to_dict() | getattr(config, "hyperparameters", {})  # the latter with defaults filled in
    found: Identity = {"rows per step": str(config.per_device_train_batch_size * config.world_size)}
    for key, value in sorted(settings.items()):
        if key not in _NO_INFLUENCE and not key.startswith(_NO_INFLUENCE_PREFIXES):
            found[key] = str(value)
    return found


def checkpoint_from_recipe(config: Any) -> str | None:
    """The checkpoint that a recipe names to start from; None if it names none, or means the folder's own."""
    named = config.resume_from_checkpoint
    return None if named is None or str(named).lower() in ("true", "false") else str(named)


def rows_digest(rows: Dataset) -> str:
    """SHA-256 of the token ids, of which are scored, of images, scores, labels and numbers, row by row in order.

    Of prompts whose answers are sampled, also of the rows' other columns, which an annotator may read.
    """
    columns = [name for name in ("prompt_ids", "response_ids", "scored") if name in rows.column_names]
    digest = hashlib.sha256()
    for name in ("scores", "label", DIGESTS, LEVELS, WEIGHT, LABEL_PROBABILITY, MARGIN, BETA):
        if name in rows.column_names:
            digest.update(json.dumps([name, rows[name][:]]).encode())
    if CONTENT in rows.column_names:
        digest.update("".join(columns_identity(prompts_from_rows(rows)).values()).encode())
    for batch in rows.select_columns(columns).with_format("arrow").iter(1000):
        for name in columns:
            column = batch[name]
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):  # lengths, at every depth
                digest.update(pc.list_value_length(column).cast(pa.int64()).to_numpy().tobytes())
                column = pc.list_flatten(column)
            digest.update(column.cast(pa.int64()).to_numpy().tobytes())
    return digest.hexdigest()


def settings_of(*arguments: Any) -> dict[str, Any]:
    """Every key of a recipe's dataclasses with its value, for the record."""
    found: dict[str, Any] = {}
    for part in arguments:
        found |= part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
    return found
