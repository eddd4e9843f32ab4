"""The model card that is saved with a trained model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import simpo
from simpo.models.adapters import adapter_settings, holds_adapter
from simpo.models.loading import below_adapter
from simpo.models.settings import ModelArguments
from simpo.runs.atomic import write_text
from simpo.runs.results import Metric
from simpo.training.settings import DataArguments
from simpo.training.tasks import Task

_SETTINGS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "max_length",
    "max_prompt_length",
    "truncation",
    "paper_tokenization",
    "sft_weight",
    "margin",
    "center_rewards_coefficient",
)


def write_model_card(
    folder: Path, task: Task, model: ModelArguments, data: DataArguments, config: Any, metrics: Iterable[Metric]
) -> None:
    """Write ``folder/README.md``: what the model was made from, with which settings, and its held-out figures."""
    names = _dataset_names(data)
    card_data = ModelCardData(
        library_name="peft" if holds_adapter(folder) else "transformers",
        tags=task.tags(config),
        base_model=_base_model(model),
        datasets=[name for name in names if not Path(name).exists()] or None,
        pipeline_tag=task.pipeline,
    )
    text = "\n".join(
        [
            f"---\n{card_data.to_yaml()}\n---",
            f"# {folder.resolve().name}",
            "",
            f"`{shown_name(model.model_name_or_path)}` {task.method(config)} on "
            f"{', '.join(f'`{shown_name(name)}`' for name in names)}, with simpo {simpo.__version__}.",
            "",
            f"## Held-out {task.rows}",
            "",
            *_results(metrics, task.rows),
            "",
            "## Settings",
            "",
            "| key | value |",
            "|---|---|",
            *(f"| `{key}` | {value} |" for key, value in (_settings(config) | _lora(model)).items()),
            "",
        ]
    )
    write_text(folder / "README.md", str(ModelCard(text)))


def _base_model(model: ModelArguments) -> str | None:
    """Its name on the hub, of an adapter that is continued its base model's; None if it is not there."""
    name = below_adapter(model).model_name_or_path
    return None if Path(name).exists() else name


def _settings(config: Any) -> dict[str, Any]:
    values = {key: getattr(config, key) for key in _SETTINGS if hasattr(config, key)}
    values = {**getattr(config, "hyperparameters", {}), **values}
    return {key: getattr(value, "value", value) for key, value in values.items()}


def _lora(model: ModelArguments) -> dict[str, Any]:
    return adapter_settings(model.lora) if model.use_peft else {}


def _dataset_names(data: DataArguments) -> list[str]:
    if data.dataset_mixer is not None:
        return list(data.dataset_mixer)
    if data.dataset_mixture is not None:
        return [entry["id"] for entry in data.dataset_mixture["datasets"]]
    return [str(data.dataset_name)]


def shown_name(name: str) -> str:
    """A hub name as it is; of a local path only its last part, which says enough and tells nothing of the machine."""
    return Path(name).name if Path(name).exists() else name


def _results(metrics: Iterable[Metric], rows_are: str) -> list[str]:
    rows: dict[str, dict[str, Metric]] = {}
    for metric in metrics:
        if metric.stage is not None:
            rows.setdefault(metric.name, {})[metric.stage] = metric
    if not rows:
        return ["None were given."]
    lines = [f"| metric | before | after | {rows_are} |", "|---|---|---|---|"]
    for name, stages in rows.items():
        before, after = stages.get("before"), stages["after"]
        lines.append(f"| {name} | {_figure(before)} | {_figure(after)} | {after.n} |")
    return lines


def _figure(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return "-"
    interval = "" if metric.low is None else f" [{metric.low:.4g}, {metric.high:.4g}]"
    return f"{metric.value:.4g}{interval}"
