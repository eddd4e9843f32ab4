"""Training on packed batches: transformers' ``Trainer`` with its own batches, loss and micro-batch loop."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from simpo.data.rows import as_dataset
from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError
from simpo.models.adapters import check_adapter
from simpo.models.checkpoint import Limits
from simpo.models.devices import check_liger
from simpo.models.loading import load_model
from simpo.models.preparation import disable_dropout, freeze_unreached, keep_gradients
from simpo.models.settings import ModelArguments
from simpo.packing.batching import MicroBatch, StepPlan, check_budget
from simpo.packing.layout import PackedBatch
from simpo.packing.model import ForwardPath, choose_path, policy_forward, prepare_policy, resolve_path, state_of
from simpo.packing.selfcheck import rows_to_check
from simpo.training.batches import (
    ComparisonRows,
    PlannedBatch,
    RowFigures,
    Scores,
    collate,
    comparisons_of,
    mean_figures,
    plan_steps,
    response_figures,
    scores_of,
    step_loader,
    token_lengths,
)
from simpo.training.callbacks import RunCallback
from simpo.training.checkpoints import ResumableTrainer
from simpo.training.finite import describe_rows, rows_not_finite, rows_without_gradient
from simpo.training.limits import check_rows
from simpo.training.memory import OUTSIDE_A_FORWARD, compile_layers, explain_oom, tokens_that_fit
from simpo.training.settings import TrainingSettings
from simpo.training.sharding import sharded

# ---- Activation checkpointing of some of the layers: memory is bought with arithmetic only as far as it is
# needed.


class CheckpointShare(TrainerCallback):
    """Leaves ``activation_checkpointing`` on for ``share`` of the layers, spread evenly.

    A layer without it keeps its activations, and its forward is not computed again in backward.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Called after ``Trainer`` has switched it on for all."""
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for number, layer in enumerate(layers):
            chosen = int((number + 1) * self._share) > int(number * self._share)
            layer.gradient_checkpointing = layer.gradient_checkpointing and chosen


logger = logging.getLogger(__name__)


_SCORED_TOGETHER = 512  # rows that micro-batches are filled from


class PackedTrainer(ResumableTrainer):
    """Trains a causal language model on comparisons of one prompt with K responses; subclasses say with which loss.

    A step's loss is the weighted mean of its rows' losses, however it is split into micro-batches and over ranks.
    Overrides of ``Trainer``: how a batch is made (``get_train_dataloader``, ``get_eval_dataloader``), how its loss is
    computed (``compute_loss``, ``prediction_step``), how micro-batches are looped (``training_step``), and what its
    bases override: logs and checkpoints.

    Args:
        model: a model, or the name or folder of one.
        args: the configuration; the defaults of ``config_type`` if not given.
        train_dataset: rows in any shape that :mod:`simpo.data` recognises, or already tokenized.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer; needed unless the data is tokenized.
        callbacks: as for ``Trainer``.
        optimizers: as for ``Trainer``.

    Raises:
        SimpoError: data or configuration that cannot be trained on; while training, a loss or gradient that is not
            finite, before the optimizer has moved.
    """

    config_type: ClassVar[type[TrainingSettings]]

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: TrainingSettings | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = self.config_type() if args is None else args
        if isinstance(model, str):
            model = self.load(model)
        if isinstance(model, PeftModel):
            check_adapter(model)
        freeze_unreached(model)
        keep_gradients(model)
        if args.disable_dropout:
            disable_dropout(model)
        if args.use_liger_kernel:
            check_liger(model, args.liger_kernel_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=self._tokenized(train_dataset, processing_class, args, "train"),
            eval_dataset=_each(eval_dataset, lambda d, name: self._tokenized(d, processing_class, args, name)),
            processing_class=processing_class,
            compute_metrics=self._mean_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for label, rows in {"train": self.train_dataset, **datasets}.items():
            if rows is not None:
                check_rows(Limits.of(self.model.config), rows, label)
        self.path = self._choose_path()
        if args.torch_compile:
            compile_layers(self.model, args, self.accelerator)
        if args.checkpointed_share < 1:
            self.add_callback(CheckpointShare(args.checkpointed_share))
        self._step: list[tuple[PlannedBatch, Tensor]] = []  # micro-batches of the current step with their rows' losses

    # ---- what a subclass says ----

    @classmethod
    def load(cls, name: str, arguments: ModelArguments | None = None) -> PreTrainedModel | PeftModel:
        """The model of a name or folder, of the kind that is trained."""
        return load_model(name, arguments)

    @classmethod
    @abstractmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize ``dataset`` for this kind of training; raises :class:`SimpoError` if it is not for it."""

    @abstractmethod
    def loss_and_metrics(self, y: Any, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Losses, ``[C]``, and detached figures, ``[C, len(metric_names)]``, of ``batch``.

        What the model says of its responses, ``y``, is :class:`~simpo.objectives.Responses` unless
        :meth:`forward_rows` is another.
        A figure that is NaN says nothing about its row and is left out of that figure's mean.
        """

    def row_weights(self, rows: Dataset) -> np.ndarray | None:
        """``[rows]`` how much each counts in its step's mean; None for all alike."""
        return None

    def completed(self, rows: Dataset) -> Dataset:
        """Tokenized ``rows`` with the columns that this kind of training adds; all ranks call."""
        return rows

    def before_step(self, model: nn.Module, batches: Sequence[PlannedBatch]) -> None:
        """What has to be known of all micro-batches of a step before its first forward."""

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """One forward: losses and figures of ``batch`` as of :meth:`loss_and_metrics`."""
        return self.loss_and_metrics(policy_forward(model, batch.packed, path=self.path), batch)

    # ---- data ----

    @classmethod
    def _tokenized(
        cls, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str
    ) -> Dataset | None:
        if dataset is None:
            return None
        dataset = as_dataset(dataset, f"{label}_dataset")
        if "prompt_ids" not in dataset.column_names and tokenizer is None:
            raise SimpoError("processing_class: give the tokenizer, or tokenized data")
        prepared = cls.prepare(dataset, tokenizer, args, label)
        rows, report = prepared.dataset, prepared.report
        if report.used < report.rows or report.cut or report.read:  # nothing is left out silently
            logger.warning("\n".join(report.lines()))
        if args.max_batch_tokens is not None:  # checked here, before anything is written
            check_budget(token_lengths(rows, padded=args.forward_path == "padded"), args.max_batch_tokens)
        return rows

    def get_train_dataloader(self) -> DataLoader:
        """One element an optimizer step: this rank's micro-batches, by the plan that all ranks share."""
        if self.train_dataset is None:
            raise SimpoError("train_dataset: there is nothing to train on")
        rows = self.completed(self.train_dataset)
        plan = self._plan(rows, self.args.train_batch_size, training=True)
        if plan.steps == 0:
            raise SimpoError(
                f"dataloader_drop_last: {len(rows)} rows are fewer than the {plan.rows_per_step} of a "
                "step, so nothing would be trained; lower per_device_train_batch_size"
            )
        # the trainer's own step count says which epoch starts, also after a resume
        return step_loader(rows, plan, lambda: self.state.global_step // max(plan.steps, 1), self.args)

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """Rows in their order, ``per_device_eval_batch_size`` a rank and element."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise SimpoError("eval_dataset: there is nothing to evaluate on")
        rows = self._tokenized(rows, self.processing_class, self.args, "eval")
        check_rows(Limits.of(self.model.config), rows, "eval")
        rows = self.completed(rows)
        return step_loader(rows, self._plan(rows, self.args.eval_batch_size, training=False), lambda: 0, self.args)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As :meth:`get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def _plan(self, rows: Dataset, rows_per_device: int, *, training: bool) -> StepPlan:
        return plan_steps(
            rows,
            self.args,
            rows_per_device,
            padded=self.path == "padded",
            shuffled=training and self.args.train_sampling_strategy == "random",
            drop_last=training and self.args.dataloader_drop_last,
            weights=self.row_weights(rows),
            rule=state_of(prepare_policy(self.model)).lengths,
        )

    # ---- loss ----

    def _choose_path(self) -> ForwardPath:
        """Let the model prove the fast path on a few real rows, in the precision that it will train in."""
        model = prepare_policy(self.model)
        rows = self.train_dataset if self.train_dataset is not None else _first(self.eval_dataset)
        if rows is None:
            return self.args.forward_path
        checked = rows_to_check(model, token_lengths(rows, padded=False).tolist())
        sample = PackedBatch.build(comparisons_of(rows, checked))
        with self.accelerator.autocast(), self.forwards():
            choose_path(model, sample)
        path = resolve_path(model, sample, self.args.forward_path)
        if path == "padded" and state_of(model).alone and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise SimpoError(
                f"{'fsdp' if self.is_fsdp_enabled else 'deepspeed'}: this model computes a row differently next to "
                "other rows, so every response needs a forward of its own, and processes that share the weights must "
                "make equally many; train without it"
            )
        packed = self._sum_over_ranks(torch.tensor(int(path == "packed"), device=self.args.device))
        return path if packed in (0, self.args.world_size) else "padded"  # ranks with other plans would wait forever

    def compute_loss(  # noqa: D102 - documented by Trainer
        self,
        model: nn.Module,
        inputs: PlannedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = inputs.to(self.args.device)
        losses, figures = self.forward_rows(model, batch)
        # ranks' gradients are averaged, so each counts world_size times over the step's weight
        loss = (losses * batch.packed.weights).sum() * (self.args.world_size / batch.step_weight)
        return (loss, figures) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As its base's; memory that runs out is answered with a setting."""
        with explain_oom(lambda: OUTSIDE_A_FORWARD):
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of all micro-batches of one optimizer step; returns its loss, ``[]``."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()  # schedule-free optimizers
        total = torch.zeros((), device=self.args.device)
        batches = inputs["micro_batches"]
        self._step = []
        self.before_step(model, batches)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self._gradient_sync(model, last=last), explain_oom(partial(self._what_fits, model, batch)):
                loss, figures = self._forward_and_backward(model, batch)
            total += loss
            self._means.add(figures, batch.packed.weights)
        return total

    def _forward_and_backward(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Run one micro-batch; returns its share of the step's loss, ``[]``, and its rows' metrics."""
        with self.compute_loss_context_manager():
            loss, figures = self.compute_loss(model, batch, return_outputs=True)
        self._step.append((batch, figures[:, 0]))
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._check_losses()
        self.accelerator.backward(loss)
        return loss.detach(), figures

    def _what_fits(self, model: nn.Module, batch: PlannedBatch) -> str:
        """Advice for a micro-batch that did not fit into memory."""

        def attempt(places: list[int]) -> None:
            rows = tuple(batch.rows[place] for place in places)
            smaller = ComparisonRows(data)[MicroBatch(rows, (1.0,) * len(rows)), batch.step_weight]
            self._forward_and_backward(model, smaller)

        data = self.completed(self.train_dataset)
        rule = state_of(prepare_policy(self.model)).lengths
        lengths = token_lengths(data, padded=self.path == "padded", rule=rule)
        own = [int(lengths[row]) for row in batch.rows]
        return tokens_that_fit(own, int(lengths.max()), attempt if self.args.world_size == 1 else None)

    @contextmanager
    def _gradient_sync(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Let ranks exchange gradients only after the last micro-batch (FSDP reduce-scatters each, to save memory)."""
        self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps when this is true
        context: AbstractContextManager[None] = nullcontext()
        if not last and not sharded(self.model):
            context = self.accelerator.no_sync(model)
        with context:
            yield

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of one step on this rank, as transformers counts them: 6 per token and non-embedding weight."""
        tokens = sum(batch.packed.tokens for batch in inputs["micro_batches"])
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    # ---- a loss or gradient that is not finite ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, which Trainer asks for before every optimizer step; ends the run if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None  # fp16: overflow is expected, and the scaler skips the step
        if not scaled and norm is not None and not math.isfinite(float(norm)):
            raise SimpoError(self._not_finite())
        return norm

    def _check_losses(self) -> None:
        """End the run if a loss of the step is not finite: DeepSpeed's last backward of a step moves the optimizer."""
        bad = sum(len(rows_not_finite(batch.rows, losses)) for batch, losses in self._step)
        if self._sum_over_ranks(torch.tensor(bad, device=self.args.device)):
            raise SimpoError(self._not_finite())

    def _not_finite(self) -> str:
        """What is wrong with the current step, and with which of its rows; every rank says the same."""
        rows = self._of_all_ranks([row for batch, losses in self._step for row in rows_not_finite(batch.rows, losses)])
        step = self._of_all_ranks([row for batch, _ in self._step for row in batch.rows])
        what = "loss"
        if not rows:
            what = "gradient"
            rows = rows_without_gradient(self.model, step, self._loss_of_row) if self.args.world_size == 1 else step
        found = describe_rows(self.train_dataset, rows)
        many = " (all rows of the step: look at the model and the learning rate)" if len(rows) == len(step) > 1 else ""
        updated = self.is_deepspeed_enabled and what == "gradient"  # its backward has moved the optimizer
        kept = "the weights were updated, the last checkpoint is unharmed" if updated else "nothing was updated"
        return (
            f"step {self.state.global_step + 1}: the {what} is not finite; rows: {found}{many}; {kept}: "
            "fix or remove what is named"
        )

    def _of_all_ranks(self, rows: list[int]) -> list[int]:
        return sorted(set(gather_object(rows) if self.args.world_size > 1 else rows))  # fillers come several times

    def _loss_of_row(self, row: int) -> Tensor:
        batch = ComparisonRows(self.completed(self.train_dataset))[MicroBatch((row,), (1.0,)), 1.0]
        with self.compute_loss_context_manager():
            return self.compute_loss(self.model, batch)

    # ---- evaluation ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but an evaluation before training prepares nothing.

        What accelerate has once prepared for evaluation it takes for prepared when training starts: it would not be
        wrapped in DDP then, and every rank would train a model of its own.
        """
        if not self.accelerator._models:
            self.accelerator._models.append(self.model)
        with self.forwards():
            engine = self.deepspeed
            self.deepspeed = self.model if engine is None else engine  # Trainer would make one that cannot train
            try:
                return super().evaluation_loop(*args, **kwargs)
            finally:
                self.deepspeed = engine

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Figures of an element's rows with their weight, ``[rows, N + 1]``, and row numbers (-1 for none)."""
        found = RowFigures(self.args.eval_batch_size * self.args.world_size, len(self.metric_names), self.args.device)
        for batch in inputs["micro_batches"]:
            with torch.no_grad(), self.accelerator.autocast():  # before training nothing is wrapped that does it
                found.add(batch, self.compute_loss(model, batch, return_outputs=True)[1])
        return None, found.figures, found.rows

    def response_logps(self, rows: Dataset) -> Tensor:
        """``[R]`` float64 log-probabilities of all responses of ``rows`` under the model as it is; all ranks call."""
        return self.of_responses(rows, lambda batch: policy_forward(self.model, batch, path=self.path).logp)

    def of_responses(self, rows: Dataset, compute: Callable[[PackedBatch], Tensor]) -> Tensor:
        """``[R]`` float64 figures of all responses of ``rows``, which ``compute`` gives a batch of; all ranks call."""
        plan = self._plan(rows, _SCORED_TOGETHER // self.args.world_size, training=False)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), self.forwards():
            own = response_figures(rows, plan, self.args.process_index, compute, self.args.device)
        return self._sum_over_ranks(own)

    def score_rows(self, dataset: Dataset) -> Scores:
        """Figures of every row of ``dataset``, in its order."""
        output = self.predict(dataset)
        return scores_of(output.predictions, output.label_ids, self.metric_names)

    def _mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = mean_figures(prediction.predictions, prediction.label_ids, self.metric_names)
        for callback in self.callback_handler.callbacks if self.is_in_train else ():
            if isinstance(callback, RunCallback):
                metrics |= callback.evaluate(self)
        return metrics


def _each(dataset: Any, function: Callable[[Dataset, str], Any]) -> Any:
    """``function(dataset, label)``, or of every one of several named data sets."""
    if isinstance(dataset, dict):
        return {name: function(part, name) for name, part in dataset.items()}
    return None if dataset is None else function(dataset, "eval")


def _first(dataset: Any) -> Dataset | None:
    return next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
