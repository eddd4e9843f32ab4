"""The workflow of ``simpo train``, ``sft``, ``reward`` and ``online``: one run in one folder."""

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

from simpo.data.images import has_images
from simpo.data.inspection import shared_rows
from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError, third_party
from simpo.models.checkpoint import model_digest
from simpo.models.devices import from_main
from simpo.models.hub import check_target, files_to_push, push
from simpo.models.loading import load_processor, load_tokenizer, round_weights
from simpo.models.settings import ModelArguments
from simpo.runs import manifest
from simpo.runs.files import provisional, staged_files
from simpo.runs.folder import RunFolder
from simpo.runs.manifest import file_digest, is_intact
from simpo.runs.results import EXAMPLES, FILE_NAME, HELD_OUT, Metric, Stage, write_results
from simpo.training.batches import rows_digest
from simpo.training.callbacks import MetricsFile, RunCallback, check_measured, log_as_lines
from simpo.training.checkpoints import StopOnSignal, check_complete, last_good_checkpoint, shared_staging
from simpo.training.guard import Guard
from simpo.training.metrics import Scores, read_scores, write_scores
from simpo.training.packed import PackedTrainer
from simpo.training.presentation import write_examples, write_model_card
from simpo.training.settings import (
    IMPOSSIBLE,
    DataArguments,
    Identity,
    check_optimizer,
    checkpoint_from_recipe,
    load_datasets,
    settings_identity,
    settings_of,
)


@dataclass(frozen=True)
class TrainingJob:
    """One training run: the parts of its recipe, the command line and file they came from, and callbacks."""

    model: ModelArguments
    data: DataArguments
    config: Any
    argv: Sequence[str] = ()
    recipe: Path | None = None
    callbacks: Sequence[TrainerCallback] = ()

    @property
    def run_callbacks(self) -> list[RunCallback]:
        """The callbacks that take part in the whole run."""
        return [callback for callback in self.callbacks if isinstance(callback, RunCallback)]

    @property
    def callback_settings(self) -> dict[str, Any]:
        """The settings of all callbacks."""
        return {key: value for callback in self.run_callbacks for key, value in callback.settings.items()}


def run_training(kind: type[PackedTrainer], job: TrainingJob) -> Path:
    """Train in a run folder. The same call continues a killed run and leaves a finished one unchanged.

    Any held-out rows are scored before and after training. The folder receives the model, tokenizer, chat template,
    model card and ``results.json``. Nothing is written before the data, model and configuration have been checked.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: a setting, the data or the model cannot be used, or the disk is full.
        InterruptedRun: a signal stopped the run; a checkpoint has been saved.
    """
    config = job.config
    if config.upload_to is not None:
        check_target(config.upload_to)
    if config.process_index:
        logging.getLogger("simpo").setLevel(logging.ERROR)  # the main rank reports what all ranks observe
    folder_path = Path(config.output_dir)
    with RunFolder(folder_path, command=kind.command, writes=config.process_index == 0) as folder:
        folder.log(f"objective: {kind.describe(config).objective}")
        trainer, metrics, identity = _prepare(kind, job, folder)
        _check_start(trainer, folder)
        folder.begin(
            identity,
            argv=job.argv,
            recipe=job.recipe,
            resolved=settings_of(job.model, job.data, config) | job.callback_settings,
            accept_changes=config.accept_changes,
        )
        if from_main(folder.finished):
            folder.log(f"{config.output_dir} already holds this run, finished")
            _upload(config, folder)
            return folder_path / FILE_NAME
        for callback in job.run_callbacks:
            callback.before_training(trainer, resumed=not folder.changed)
        before = None
        if trainer.eval_dataset is not None:
            before = _score(trainer, folder_path, "before", known=not folder.changed)
        metrics += _train(trainer, folder)
        _save_model(trainer, folder_path, job.model.save_dtype)  # first, so that no later failure loses the model
        metrics += trainer.summary()
        if before is not None:
            metrics += trainer.compare(before, _score(trainer, folder_path, "after", known=False))
        if folder.writes:
            write_model_card(folder_path, kind, job.model, job.data, config, metrics)
            write_results(folder_path, command=kind.command, fingerprint=folder.fingerprint, metrics=metrics)
        folder.finish()
        _upload(config, folder)
    return folder_path / FILE_NAME


def _upload(config: Any, folder: RunFolder) -> None:
    """Upload a finished run if the recipe sets ``push_to_hub``; the same command continues a failed upload."""
    if config.upload_to is not None and folder.writes:
        files = files_to_push(folder.path)
        url = push(folder.path, config.upload_to, files, private=bool(config.hub_private_repo), report=folder.log)
        folder.log(f"uploaded: {url}")


def _prepare(
    kind: type[PackedTrainer], job: TrainingJob, folder: RunFolder
) -> tuple[PackedTrainer, list[Metric], Identity]:
    """Return the trainer, metrics of the data and the run's identity: everything that can fail before writing."""
    config = job.config
    with config.main_process_first(desc="reading and tokenizing the data"):  # other ranks then read it from the cache
        processing, raw, prepared = prepare_data(kind, job)
    metrics = []
    for part in prepared.values():
        for line in part.report.lines():
            folder.log(line)
        metrics += [Metric(name, value) for name, value in part.report.metrics()]
    train, held_out = prepared["train"].dataset, prepared["eval"].dataset if "eval" in prepared else None
    if held_out is not None:
        metrics += _overlap(train, held_out, kind.row_noun, folder)
    elif config.eval_strategy != "no" or config.do_eval:
        folder.log(f"no held-out {kind.row_noun} (set eval_dataset_name); training without evaluation")
        config.eval_strategy, config.do_eval = type(config.eval_strategy)("no"), False
    _check_evaluated(config, held_out)
    for callback in job.run_callbacks:
        callback.prepare(config, processing, raw.get("eval"), folder.log)
    checkpoint = checkpoint_from_recipe(config)
    if checkpoint is not None:
        check_complete(Path(checkpoint))
    identity = training_identity(job.model, job.data, config, train, held_out)
    identity |= {key: str(value) for key, value in job.callback_settings.items()}
    _check_ranks_agree(identity, config)
    set_seed(config.seed)  # a new adapter is initialized at random
    model = kind.load(job.model)
    extra: dict[str, Any] = {"loading": job.model} if kind.takes_loading else {}
    with third_party(IMPOSSIBLE):
        trainer = kind(
            model,
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processing,
            callbacks=list(job.callbacks),
            **extra,
        )
    if config.metric_for_best_model is not None and config.eval_strategy != "no":
        check_measured("metric_for_best_model", config.metric_for_best_model, trainer)
    for callback in job.run_callbacks:
        callback.check_trainer(trainer)
    check_optimizer(trainer)
    if generation := getattr(trainer.model, "generation_config", None):
        with third_party("model_name_or_path: generation_config.json"):  # saving would reject an invalid one
            generation.validate(strict=True)
    if isinstance(trainer.model, PeftModel):
        trained, total = trainer.model.get_nb_trainable_parameters()
        folder.log(f"adapter: {trained:,} of {total:,} parameters are trained")
        if config.disable_dropout and job.model.lora.get("lora_dropout"):
            folder.log("lora_dropout: has no effect unless disable_dropout is false")
    return trainer, metrics, identity


def training_identity(
    model: ModelArguments, data: DataArguments, config: Any, train: Dataset, held_out: Dataset | None
) -> Identity:
    """Return what identifies a run: initial model, rows in order, and every setting that influences training.

    Data and models are identified by their contents rather than their location, a hub model by its name and revision.
    """
    identity: Identity = {"model": model_digest(model), "dtype": model.dtype, "chat_template": data.chat_template}
    identity |= {key: str(value) for key, value in (model.new_adapter | model.quantization).items()}
    if model.save_dtype is not None:
        identity["save_dtype"] = model.save_dtype
    identity["data/train"] = rows_digest(train)
    identity["data/eval"] = None if held_out is None else rows_digest(held_out)
    checkpoint = checkpoint_from_recipe(config)
    identity["resume_from_checkpoint"] = (
        None if checkpoint is None else file_digest(Path(checkpoint) / manifest.FILE_NAME)
    )
    return identity | settings_identity(config)


def prepare_data(kind: type[PackedTrainer], job: TrainingJob) -> tuple[Any, dict[str, Dataset], dict[str, Prepared]]:
    """Return the tokenizer (the processor for rows with images), the raw rows and the tokenized rows.

    Rows are keyed by ``train`` and, if there are held-out rows, ``eval``.
    """
    template = job.data.chat_template
    processing: Any = load_tokenizer(job.model, chat_template=template)  # a wrong name fails before data is read
    datasets = zip(("train", "eval"), load_datasets(job.data), strict=True)
    raw = {label: rows for label, rows in datasets if rows is not None}
    if kind.takes_images and any(map(has_images, raw.values())):
        processing = load_processor(job.model, chat_template=template)
    return processing, raw, {label: kind.prepare(rows, processing, job.config, label) for label, rows in raw.items()}


def _check_evaluated(config: Any, held_out: Dataset | None) -> None:
    """Raise :class:`SimpoError` if the best checkpoint is wanted, but there will be no evaluation."""
    wanted = {"load_best_model_at_end": config.load_best_model_at_end, "save_strategy": config.save_strategy == "best"}
    if any(wanted.values()) and (held_out is None or config.eval_strategy == "no"):
        key = next(key for key, value in wanted.items() if value)
        raise SimpoError(f"{key}: needs evaluations to find the best checkpoint; set eval_dataset_name, eval_strategy")


def _overlap(train: Dataset, held_out: Dataset, noun: str, folder: RunFolder) -> list[Metric]:
    """Count the held-out rows that are also training rows; raise :class:`SimpoError` if all of them are."""
    rows, prompts = shared_rows(train, held_out)
    count = len(held_out)
    if rows == count:
        raise SimpoError(
            f"eval_dataset_name, dataset_test_split: all {count:,} held-out {noun} are also training {noun}; hold out "
            "others, e.g. dataset_train_split: train[:90%] and dataset_test_split: train[90%:]"
        )
    if prompts:
        folder.log(
            f"eval: {rows:,} of {count:,} held-out {noun} are also training {noun}, and {prompts:,} share a prompt "
            "with one"
        )
    counts = {"rows_in_train": rows, "prompts_in_train": prompts}
    return [Metric(f"data/eval/{name}", value, n=count) for name, value in counts.items()]


def _check_ranks_agree(identity: Identity, config: Any) -> None:
    """Raise :class:`SimpoError` on every rank if any was started with another recipe, model or data."""
    ranks = gather_object([identity]) if config.world_size > 1 else [identity]
    for rank, other in enumerate(ranks):
        for key, value in ranks[0].items():
            if other.get(key) != value:
                raise SimpoError(
                    f"{key}: process {rank} has {other.get(key)!r}, process 0 has {value!r}; start all with the same "
                    "recipe, model and data"
                )


def _score(trainer: PackedTrainer, folder: Path, stage: Stage, *, known: bool) -> Scores:
    """Score the held-out rows with the current weights, and write the scores and examples to ``folder``.

    If a killed run may have left valid files (``known``), read them instead when they are intact.
    """
    path, examples, rows = folder / HELD_OUT[stage], folder / EXAMPLES[stage], trainer.eval_dataset
    scores = from_main(read_scores(path, len(rows)) if known else None)
    if scores is None:
        scores = trainer.score_rows(rows)
        if trainer.is_world_process_zero():
            write_scores(path, rows, scores)
    if not known or not from_main(is_intact(examples)):
        write_examples(examples, trainer)
    return scores


def _train(trainer: PackedTrainer, folder: RunFolder) -> list[Metric]:
    """Train, from the newest undamaged checkpoint if there is one, and return the metrics of training."""
    if trainer.args.guard != "off":
        trainer.add_callback(Guard(trainer, trainer.args.guard))
    stop = StopOnSignal()
    trainer.add_callback(stop)
    start = _starting_point(trainer, folder)
    if folder.writes:
        from_this_run = start is not None and Path(start).resolve().parent == folder.path.resolve()
        trainer.add_callback(MetricsFile(folder.metrics, from_this_run=from_this_run))
        log_as_lines(trainer, folder.log)
    set_seed(trainer.args.seed)  # so that it does not matter whether held-out scores were computed or read
    with stop:
        outcome = trainer.train(resume_from_checkpoint=start)
    metrics = [Metric("train/loss", trainer.mean_loss()), Metric("train/steps", outcome.global_step)]
    return [*metrics, Metric("train/tokens", trainer.trained_tokens())]


def _check_start(trainer: PackedTrainer, folder: RunFolder) -> None:
    """Check the checkpoint that training starts from, before the folder records this run's settings.

    A run that continues with unchanged settings has recorded them already, and ``train`` checks its checkpoint.
    """
    resuming, finished = from_main((folder.resuming, folder.finished))
    if finished or (resuming and not trainer.args.accept_changes):
        return
    newest = from_main(last_good_checkpoint(folder.path) if folder.writes and resuming else None)
    start = newest or checkpoint_from_recipe(trainer.args)
    if start is not None:
        trainer.check_start(Path(start))


def _starting_point(trainer: PackedTrainer, folder: RunFolder) -> str | None:
    """Return this run's newest undamaged checkpoint, else the one in the recipe, or None for the initial model."""
    checkpoint = from_main(last_good_checkpoint(folder.path) if folder.writes else None)
    if checkpoint is not None:
        folder.log(f"continues from {checkpoint}")
        return str(checkpoint)
    if folder.resuming:
        folder.log("no checkpoint was saved; starting from the beginning")
    return checkpoint_from_recipe(trainer.args)


def _save_model(trainer: PackedTrainer, folder: Path, dtype: str | None) -> None:
    """Save the model (rounded to ``dtype`` if given), tokenizer and trainer state, each file atomically."""
    if callable(to_eval := getattr(trainer.optimizer, "eval", None)):
        to_eval()  # schedule-free optimizers: save the averaged weights, as used for evaluation
    main, wait = trainer.is_world_process_zero(), trainer.accelerator.wait_for_everyone
    name = provisional(folder / ".files")
    with shared_staging(staged_files(folder), name, main=main, wait=wait) as staging:
        trainer.save_model(str(staging))
        if main and dtype is not None:
            round_weights(staging, dtype)
        if main:
            trainer.state.save_to_json(str(staging / TRAINER_STATE_NAME))
