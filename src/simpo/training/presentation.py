"""Human-readable output of a run: the model card, and held-out examples as text with token log-probabilities."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

import simpo
from simpo.data.images import text_tokenizer
from simpo.models.adapters import has_adapter_weights
from simpo.models.checkpoint import display_name
from simpo.models.loading import base_model_of
from simpo.models.settings import ModelArguments
from simpo.packing.model import policy_logprobs
from simpo.runs.files import write_lines, write_text
from simpo.runs.manifest import write_digest
from simpo.runs.results import Metric
from simpo.training.batches import scored_tokens
from simpo.training.packed import PackedTrainer
from simpo.training.settings import DataArguments

_SETTINGS = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type",
    "warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16", "fp16", "seed", "max_length",
    "max_prompt_length", "truncation", "paper_tokenization", "sft_weight", "row_columns", "margin",
    "center_rewards_coefficient",
)  # fmt: skip

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
    """Write ``folder/README.md``: the initial model and data, the settings, and metrics on held-out rows."""
    if data.dataset_mixer is not None:
        names = list(data.dataset_mixer)
    elif data.dataset_mixture is not None:
        names = [entry["id"] for entry in data.dataset_mixture["datasets"]]
    else:
        names = [str(data.dataset_name)]
    description, metrics = kind.describe(config), list(metrics)
    base = base_model_of(model).model_name_or_path
    card_data = ModelCardData(
        library_name="peft" if has_adapter_weights(folder) else "transformers",
        tags=description.tags,
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
        method=description.method,
        datasets=", ".join(f"`{display_name(name)}`" for name in names),
        version=simpo.__version__,
        rows=kind.row_noun,
        results=_results(metrics, kind.row_noun),
        settings={key: getattr(value, "value", value) for key, value in settings.items()},
    )
    write_text(folder / "README.md", str(card))


def _eval_results(metrics: Iterable[Metric], kind: type[PackedTrainer], data: str) -> list[EvalResult]:
    """Convert the metrics on held-out rows after training to the hub's metadata."""
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
    """Return the lines of a table with the metrics measured before and after training."""
    stages: dict[str, dict[str, Metric]] = {}
    for metric in metrics:
        if metric.stage is not None:
            stages.setdefault(metric.name, {})[metric.stage] = metric
    if not stages:
        return ["There were none."]
    lines = [f"| metric | before | after | {rows} |", "|---|---|---|---|"]
    for name, by_stage in stages.items():
        before, after = by_stage.get("before"), by_stage["after"]
        lines.append(f"| {name} | {before.text if before else '-'} | {after.text} | {after.n} |")
    return lines


# ---- Examples for the report.


_EXAMPLES = 100  # rows; few enough that a large held-out set does not need a second pass
_CONTEXT = 8  # preceding ids to decode along with a token, so that it is decoded as a continuation
_INCOMPLETE = "\ufffd"  # what an incomplete character decodes to


def write_examples(path: Path, trainer: PackedTrainer) -> None:
    """Write a seeded sample of the held-out rows, scored with the current weights. Every rank must call this.

    Each JSON line has the row's number, ``where`` it came from, the ``prompt``, and for every response the ``texts`` of
    its tokens and their ``logps`` in nats, null for tokens that are not scored. Reward models have no ``logps``.
    """
    rows: Any = trainer.add_columns(trainer.eval_dataset)
    count = min(len(rows), _EXAMPLES)
    numbers = sorted(np.random.default_rng(trainer.args.seed).permutation(len(rows))[:count].tolist())
    rows = rows.select(numbers)
    logps: Iterator[float] = iter(())
    if trainer.pipeline == "text-generation":
        compute = partial(policy_logprobs, trainer.model, path=trainer.path)
        logps = iter(trainer.compute_for_responses(rows, compute, scored_tokens(rows)).tolist())
    tokenizer = text_tokenizer(trainer.processing_class)
    if trainer.is_world_process_zero() and isinstance(tokenizer, PreTrainedTokenizerBase):
        decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        image = getattr(trainer.model.config, "image_token_id", None)
        shortened = (row | {"prompt_ids": _collapse_images(row["prompt_ids"], image)} for row in rows)
        write_lines(path, (_record(row, number, decode, logps) for row, number in zip(shortened, numbers, strict=True)))
        write_digest(path)


def _collapse_images(ids: list[int], image: int | None) -> list[int]:
    """Replace each run of image tokens by a single one."""
    return ids[:1] + [token for before, token in pairwise(ids) if token != image or before != image]


def _record(row: dict[str, Any], number: int, decode: Callable[[Any], str], logps: Iterator[float]) -> dict[str, Any]:
    responses = []
    for place, ids in enumerate(row["response_ids"]):
        mask = row["scored"][place] if "scored" in row else [True] * len(ids)
        response_logps = list(islice(logps, sum(mask)))
        response: dict[str, Any] = {"texts": token_texts(decode, ids)}
        if response_logps:
            each = iter(response_logps)
            response["logps"] = [round(next(each), 4) if scored else None for scored in mask]
        responses.append(response)
    judgments = {key: row[key] for key in ("scores", "label") if row.get(key) is not None}
    extra = json.loads(row.get("extra") or "{}")
    return {
        "row": number, "where": row.get("where"), "prompt": decode(row["prompt_ids"]), "responses": responses,
        **judgments,
        **({"id": extra["id"]} if "id" in extra else {}),
    }  # fmt: skip


def token_texts(decode: Callable[[Any], str], ids: Sequence[int]) -> list[str]:
    """Return the text of every token; a character spanning several tokens is assigned to the last of them."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        context = list(ids[max(0, start - _CONTEXT) : start])
        text = decode([*context, *ids[start:end]])[len(decode(context)) :]
        if text.endswith(_INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts
