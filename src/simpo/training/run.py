"""The workflow behind ``simpo train``: data and model in, a better model and its figures out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.data.report import DataReport
from simpo.data.tokenize import prepare
from simpo.errors import SimpoError
from simpo.results import Metric, Stage, fingerprint, write_results
from simpo.statistics import mcnemar, mean_interval, proportion_interval
from simpo.training.card import write_model_card
from simpo.training.inputs import DataArguments, load_datasets
from simpo.training.metrics import NAMES
from simpo.training.models import ModelArguments, load_model, load_tokenizer
from simpo.training.trainer import PairScores, PreferenceTrainer

ACCURACY = "rewards/accuracies"
Say = Callable[[str], None]


def train_preferences(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    config: Any,
    *,
    say: Say = print,
) -> Path:
    """Train on preference pairs and save model, tokenizer, template, model card and ``results.json``.

    Held-out pairs, where there are some, are scored before and after. Nothing is written before data, model and
    configuration have proved usable.

    Args:
        model_arguments: the model that training starts from.
        data_arguments: the pairs.
        config: a :data:`~simpo.training.config.PreferenceConfig`.
        say: gets the progress, line by line.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: something that the user gave cannot be used; nothing has been written.
    """
    say = say if config.process_index == 0 else _silent
    folder = Path(config.output_dir)
    settings = ", ".join(f"{key} {value}" for key, value in config.hyperparameters.items())
    say(f"objective: {config.objective} ({settings})")
    refuse_used_folder(folder, config.resume_from_checkpoint)
    train_rows, eval_rows = load_datasets(data_arguments)
    name = model_arguments.model_name_or_path
    tokenizer = load_tokenizer(name, model_arguments, chat_template=data_arguments.chat_template)
    train, reports = _prepared(train_rows, tokenizer, config, "train", say)
    held_out = None
    if eval_rows is not None:
        held_out, more = _prepared(eval_rows, tokenizer, config, "eval", say)
        reports += more
    elif config.eval_strategy != "no" or config.do_eval:
        say("no held-out pairs are named (eval_dataset_name): training without evaluation")
        config.eval_strategy, config.do_eval = type(config.eval_strategy)("no"), False
    trainer = PreferenceTrainer(
        load_model(name, model_arguments),
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    identity = _fingerprint(model_arguments, data_arguments, config, train, held_out)
    metrics = [Metric(name, value) for report in reports for name, value in report.metrics()]
    metrics += _train_and_compare(trainer, held_out)
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.save_state()
        write_model_card(folder, model_arguments, data_arguments, config, metrics)
        write_results(folder, command="train", fingerprint=identity, metrics=metrics)
    return folder / "results.json"


def _train_and_compare(trainer: PreferenceTrainer, held_out: Dataset | None) -> list[Metric]:
    before = trainer.score_pairs(held_out) if held_out is not None else None
    outcome = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    metrics = [Metric("train/loss", outcome.training_loss), Metric("train/steps", outcome.global_step)]
    if held_out is not None and before is not None:
        metrics += held_out_metrics(before, trainer.score_pairs(held_out))
    return metrics


def _silent(line: str) -> None:
    """What the other ranks say."""


def refuse_used_folder(folder: Path, resuming: Any) -> None:
    """Raise :class:`SimpoError` if ``folder`` holds something already and the run does not continue it."""
    if folder.is_file():
        raise SimpoError(f"output_dir: {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not resuming:
        raise SimpoError(
            f"output_dir: {folder} is not empty (another run?); name a new folder, or set resume_from_checkpoint"
        )


def held_out_metrics(before: PairScores, after: PairScores) -> list[Metric]:
    """Figures of held-out pairs with 95% intervals, before and after, and whether the rise in accuracy is chance."""
    stages: tuple[tuple[Stage, PairScores], ...] = (("before", before), ("after", after))
    metrics = []
    for name in NAMES:
        for stage, scores in stages:
            values = scores[name]
            accuracy = name == ACCURACY
            found = proportion_interval(int(values.sum()), len(values)) if accuracy else mean_interval(values)
            metrics.append(Metric(f"eval_{name}", found.value, stage, found.n, found.low, found.high, found.method))
    test = mcnemar(before[ACCURACY].astype(bool), after[ACCURACY].astype(bool))
    metrics.append(Metric(f"eval_{ACCURACY}/p_value", test.p, n=len(before[ACCURACY]), method="McNemar, one-sided"))
    return metrics


def _prepared(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: Any, label: str, say: Say
) -> tuple[Dataset, list[DataReport]]:
    prepared = prepare(rows, tokenizer, config.tokenize_settings, label=label)
    for line in prepared.report.lines():
        say(line)
    return prepared.dataset, [prepared.report]


def _fingerprint(
    model: ModelArguments, data: DataArguments, config: Any, train: Dataset, held_out: Dataset | None
) -> str:
    """Of what determines the result: start model, rows in their order, and the settings that act on training."""
    settings = config.to_dict()
    for key in ("output_dir", "logging_dir", "run_name", "report_to", "hub_model_id", "hub_token", "disable_tqdm"):
        settings.pop(key, None)
    datasets = [None if rows is None else _digest(rows) for rows in (train, held_out)]
    parts = {
        "model": {**dataclasses.asdict(model), "files": _model_digest(model)},
        "chat_template": data.chat_template,
        "config": {key: str(value) for key, value in sorted(settings.items())},
        "objective": {key: str(value) for key, value in config.hyperparameters.items()},
    }
    return fingerprint(parts, datasets)


def _digest(rows: Dataset) -> str:
    """Of the token ids, in their order."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["prompt_ids", "response_ids"]).with_format("arrow").iter(1000):
        for prompt, responses in zip(batch["prompt_ids"].to_pylist(), batch["response_ids"].to_pylist(), strict=True):
            digest.update(np.array([*prompt, -1, *(i for ids in responses for i in [*ids, -1])], np.int64).tobytes())
    return digest.hexdigest()


def _model_digest(model: ModelArguments) -> str | None:
    """Of a local model's weight files; a hub model is told by its name and revision."""
    files = sorted(Path(model.model_name_or_path).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None
