"""The workflow of ``simpo train``, ``simpo sft`` and ``simpo reward``: one run in one folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from simpo.data.inspection import shared_rows
from simpo.errors import SimpoError
from simpo.models.adapters import describe_adapter
from simpo.models.devices import from_main
from simpo.models.loading import load_tokenizer, round_weights
from simpo.models.settings import ModelArguments
from simpo.runs.atomic import provisional, staged_files
from simpo.runs.folder import RunFolder
from simpo.runs.results import FILE_NAME, Metric, write_results
from simpo.training.batches import Scores
from simpo.training.callbacks import MetricsFile, RunCallback, log_in_lines
from simpo.training.card import write_model_card
from simpo.training.checkpoints import StopOnSignal, check_whole, last_good_checkpoint, shared_staging
from simpo.training.held_out import read_scores, write_scores
from simpo.training.identity import Identity, named_checkpoint, settings_of, training_identity
from simpo.training.packed import PackedTrainer
from simpo.training.settings import DataArguments, load_datasets, settings_refused, try_optimizer
from simpo.training.tasks import Task

_SCORES = {"before": "held_out_before.jsonl", "after": "held_out_after.jsonl"}


@dataclass(frozen=True)
class TrainingJob:
    """One training: the recipe's parts, the command line and file that they were read from, and callbacks."""

    model: ModelArguments
    data: DataArguments
    config: Any
    argv: Sequence[str] = ()
    recipe: Path | None = None
    callbacks: Sequence[TrainerCallback] = ()


def run_training(task: Task, given: TrainingJob) -> Path:
    """Train in a run folder: the same call continues a killed run and leaves a finished one as it is.

    Held-out rows, where there are some, are scored before and after. The folder gets the model, tokenizer, template,
    model card and ``results.json``. Nothing is written before data, model and configuration have proved usable.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: something that the user gave cannot be used, or the disk is full.
        InterruptedRun: a signal came; a checkpoint has been saved.
    """
    config = given.config
    if config.process_index:
        logging.getLogger("simpo").setLevel(logging.ERROR)  # what all ranks notice, the main one says
    results = Path(config.output_dir) / FILE_NAME
    with RunFolder(config.output_dir, command=task.command, writes=config.process_index == 0) as folder:
        folder.log(task.describe(config))
        trainer, metrics, held_out, identity = _prepare(task, given, folder)
        folder.begin(
            identity,
            argv=given.argv,
            recipe=given.recipe,
            resolved=settings_of(given.model, given.data, config) | _callback_settings(given),
            accept_changes=config.accept_changes,
        )
        if from_main(folder.finished):
            folder.log(f"{config.output_dir} holds this run, finished")
            return results
        for callback in _run_callbacks(given):
            callback.before_training(trainer, resumed=not folder.changed)
        metrics += _train(task, trainer, held_out, folder)
        _save_model(trainer, Path(config.output_dir), given.model.save_dtype)
        if config.process_index == 0:
            write_model_card(Path(config.output_dir), task, given.model, given.data, config, metrics)
            write_results(
                Path(config.output_dir), command=task.command, fingerprint=folder.fingerprint, metrics=metrics
            )
        folder.finish()
    return results


def _prepare(
    task: Task, given: TrainingJob, folder: RunFolder
) -> tuple[PackedTrainer, list[Metric], Dataset | None, Identity]:
    """Everything that can fail before the first write: the trainer, data figures, held-out rows, and the identity."""
    config = given.config
    name = given.model.model_name_or_path
    metrics, datasets = [], {}
    with config.main_process_first(desc="reading and tokenizing the data"):  # the others find it in the cache
        tokenizer = load_tokenizer(name, given.model, chat_template=given.data.chat_template)
        raw = dict(zip(("train", "eval"), load_datasets(given.data), strict=True))
        for label, rows in raw.items():
            if rows is not None:
                prepared = task.trainer.prepare(rows, tokenizer, config, label)
                for line in prepared.report.lines():
                    folder.log(line)
                metrics += [Metric(name, value) for name, value in prepared.report.metrics()]
                datasets[label] = prepared.dataset
    held_out = datasets.get("eval")
    if held_out is not None:
        metrics += _shared(datasets["train"], held_out, task.rows, folder)
    if held_out is None and (config.eval_strategy != "no" or config.do_eval):
        folder.log(f"no held-out {task.rows} are named (eval_dataset_name): training without evaluation")
        config.eval_strategy, config.do_eval = type(config.eval_strategy)("no"), False
    for callback in _run_callbacks(given):
        callback.prepare(config, tokenizer, raw["eval"], folder.log)
    checkpoint = named_checkpoint(config)
    if checkpoint is not None:
        check_whole(Path(checkpoint))
    identity = training_identity(given.model, given.data, config, datasets["train"], held_out)
    identity |= {key: str(value) for key, value in _callback_settings(given).items()}
    _check_ranks_agree(identity, config)
    set_seed(config.seed)  # a new adapter's first weights are drawn
    model = task.trainer.load(name, given.model)
    with settings_refused():
        trainer = task.trainer(
            model,
            args=config,
            train_dataset=datasets["train"],
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=list(given.callbacks),
        )
    for callback in _run_callbacks(given):
        callback.check_trainer(trainer)
    try_optimizer(trainer)
    if isinstance(trainer.model, PeftModel):
        folder.log(describe_adapter(trainer.model))
        if config.disable_dropout and given.model.lora.get("lora_dropout"):
            folder.log("lora_dropout: has no effect while disable_dropout is true, its default")
    return trainer, metrics, held_out, identity


def _shared(train: Dataset, held_out: Dataset, noun: str, folder: RunFolder) -> list[Metric]:
    """How many held-out rows are training rows, which is said.

    Raises:
        SimpoError: all of them are.
    """
    rows, prompts = shared_rows(train, held_out)
    count = len(held_out)
    if rows == count:
        raise SimpoError(
            f"eval_dataset_name, dataset_test_split: all {count:,} held-out {noun} are training {noun}; name others, "
            "e.g. dataset_train_split: train[:90%] and dataset_test_split: train[90%:]"
        )
    if prompts:
        folder.log(
            f"eval: {rows:,} of {count:,} held-out {noun} are training {noun}, and {prompts:,} have a prompt of one"
        )
    found = {"rows_in_train": rows, "prompts_in_train": prompts}
    return [Metric(f"data/eval/{name}", value, n=count) for name, value in found.items()]


def _run_callbacks(given: TrainingJob) -> list[RunCallback]:
    return [callback for callback in given.callbacks if isinstance(callback, RunCallback)]


def _callback_settings(given: TrainingJob) -> dict[str, Any]:
    return {key: value for callback in _run_callbacks(given) for key, value in callback.settings.items()}


def _check_ranks_agree(identity: Identity, config: Any) -> None:
    """Raise :class:`SimpoError`, on every rank, if one was given something else to train on or with."""
    ranks = gather_object([identity]) if config.world_size > 1 else [identity]
    for rank, other in enumerate(ranks):
        for key, value in ranks[0].items():
            if other.get(key) != value:
                raise SimpoError(
                    f"{key}: process {rank} has {other.get(key)!r}, process 0 has {value!r}; start all with the same "
                    "recipe, model and data"
                )


def _train(task: Task, trainer: PackedTrainer, held_out: Dataset | None, folder: RunFolder) -> list[Metric]:
    """Train, from the newest whole checkpoint if there is one; the figures of training and held-out rows."""
    output_dir = Path(trainer.args.output_dir)
    before = None
    if held_out is not None:  # once, also of a killed run
        stored = None if folder.changed else read_scores(output_dir / _SCORES["before"], len(held_out))
        before = from_main(stored)
        before = before or _score(trainer, held_out, output_dir / _SCORES["before"])
    stop = StopOnSignal()
    trainer.add_callback(stop)
    if folder.writes:
        trainer.add_callback(MetricsFile(folder.metrics))
        log_in_lines(trainer, folder.log)
    set_seed(trainer.args.seed)  # whether the held-out rows have just been scored or their scores were read
    with stop:
        outcome = trainer.train(resume_from_checkpoint=_starting_point(trainer, folder))
    metrics = [Metric("train/loss", trainer.mean_loss()), Metric("train/steps", outcome.global_step)]
    if held_out is not None and before is not None:
        metrics += task.compare(trainer.args, before, _score(trainer, held_out, output_dir / _SCORES["after"]))
    return metrics


def _starting_point(trainer: PackedTrainer, folder: RunFolder) -> str | None:
    """The newest whole checkpoint of this run, or the one that the recipe names, or None for the start model."""
    found = from_main(last_good_checkpoint(Path(trainer.args.output_dir)) if folder.writes else None)
    if found is not None:
        folder.log(f"continues from {found}")
        return str(found)
    if folder.resuming:
        folder.log("no checkpoint had been saved: starting from the beginning")
    return named_checkpoint(trainer.args)


def _score(trainer: PackedTrainer, rows: Dataset, path: Path) -> Scores:
    """Scores of held-out rows, kept row by row in the run folder."""
    scores = trainer.score_rows(rows)
    if trainer.is_world_process_zero():
        write_scores(path, rows, scores)
    return scores


def _save_model(trainer: PackedTrainer, folder: Path, dtype: str | None) -> None:
    """Model, rounded to ``dtype`` if there is one, tokenizer and trainer state, each file whole or absent."""
    main, wait = trainer.is_world_process_zero(), trainer.accelerator.wait_for_everyone
    name = provisional(folder / ".files")
    with shared_staging(staged_files(folder), name, main=main, wait=wait) as staging:
        trainer.save_model(str(staging))
        if main and dtype is not None:
            round_weights(staging, dtype)
        if main:
            trainer.state.save_to_json(str(staging / TRAINER_STATE_NAME))
