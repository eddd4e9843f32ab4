"""The model card that is saved with a trained model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import simpo
from simpo.models.adapters import has_adapter_weights
from simpo.models.checkpoint import display_name
from simpo.models.loading import base_model_of
from simpo.models.settings import ModelArguments
from simpo.runs.atomic import write_text
from simpo.runs.results import Metric
from simpo.training.packed import PackedTrainer
from simpo.training.settings import DataArguments

_SETTINGS = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type"),
    *("warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16", "fp16", "seed", "max_length"),
    *("max_prompt_length", "truncation", "paper_tokenization", "sft_weight", "row_columns", "margin"),
    "center_rewards_coefficient",
)

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

`{{ model }}` {{ method }} on {{ datasets }}, with simpo {{ version }}.

## Held-out {{ rows }}

{% for line in results %}{{ line }}
{% endfor %}
## Settings

| key | value |
|---|---|
{% for key, value in settings.items() %}| `{{ key }}` | {{ value }} |
{% endfor %}"""


def write_model_card(
    folder: Path,
    kind: type[PackedTrainer],
    model: ModelArguments,
    data: DataArguments,
    config: Any,
    metrics: Iterable[Metric],
) -> None:
    """Write ``folder/README.md``: what the model was trained from, its settings, and its metrics on held-out rows."""
    if data.dataset_mixer is not None:
        names = list(data.dataset_mixer)
    elif data.dataset_mixture is not None:
        names = [entry["id"] for entry in data.dataset_mixture["datasets"]]
    else:
        names = [str(data.dataset_name)]
    about, metrics = kind.describe(config), list(metrics)
    base = base_model_of(model).model_name_or_path
    card_data = ModelCardData(
        library_name="peft" if has_adapter_weights(folder) else "transformers",
        tags=about.tags,
        base_model=None if Path(base).exists() else base,
        datasets=[name for name in names if not Path(name).exists()] or None,
        pipeline_tag=kind.pipeline,
        model_name=folder.resolve().name,
        eval_results=_eval_results(metrics, kind, display_name(data.eval_dataset_name or names[0])) or None,
    )
    settings = {**getattr(config, "hyperparameters", {})}
    settings |= {key: getattr(config, key) for key in _SETTINGS if hasattr(config, key)}
    settings |= model.new_adapter
    card = ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        title=folder.resolve().name,
        model=display_name(model.model_name_or_path),
        method=about.method,
        datasets=", ".join(f"`{display_name(name)}`" for name in names),
        version=simpo.__version__,
        rows=kind.row_noun,
        results=_results(metrics, kind.row_noun),
        settings={key: getattr(value, "value", value) for key, value in settings.items()},
    )
    write_text(folder / "README.md", str(card))


def _eval_results(metrics: Iterable[Metric], kind: type[PackedTrainer], data: str) -> list[EvalResult]:
    """Metrics on held-out rows after training, as the hub's metadata have them."""
    return [
        EvalResult(
            task_type=kind.pipeline,
            dataset_type=data,
            dataset_name=f"{data} (held-out {kind.row_noun})",
            metric_type=metric.name,
            metric_value=metric.value,
        )
        for metric in metrics
        if metric.stage == "after" and metric.value is not None and math.isfinite(metric.value)
    ]


def _results(metrics: Iterable[Metric], rows: str) -> list[str]:
    """The lines of a table of the metrics that have stages."""
    stages: dict[str, dict[str, Metric]] = {}
    for metric in metrics:
        if metric.stage is not None:
            stages.setdefault(metric.name, {})[metric.stage] = metric
    if not stages:
        return ["None were given."]
    lines = [f"| metric | before | after | {rows} |", "|---|---|---|---|"]
    for name, found in stages.items():
        before, after = found.get("before"), found["after"]
        lines.append(f"| {name} | {before.text if before else '-'} | {after.text} | {after.n} |")
    return lines
