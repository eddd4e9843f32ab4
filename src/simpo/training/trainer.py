"""Preference training: transformers' ``Trainer`` with its own batches, loss and micro-batch loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from simpo.data.tokenize import prepare
from simpo.errors import SimpoError
from simpo.objectives import Responses, sft_term
from simpo.packing.binning import StepPlan, check_budget
from simpo.packing.layout import PackedBatch
from simpo.packing.policy import ForwardPath, policy_forward, prepare_policy, resolve_path
from simpo.packing.selfcheck import choose_path
from simpo.training.batches import (
    ComparisonRows,
    PlannedBatch,
    PlanSampler,
    collate,
    comparisons_of,
    response_counts,
    token_lengths,
)
from simpo.training.config import PreferenceConfig
from simpo.training.metrics import NAMES, pair_metrics
from simpo.training.models import disable_dropout, load_model

logger = logging.getLogger(__name__)

# Figures of every pair of a data set, in its order: the names of the metrics, ``[rows]`` each.
PairScores = dict[str, np.ndarray]


class PreferenceTrainer(Trainer):
    """Trains a causal language model on preference pairs.

    Args:
        model: a model, or the name or folder of one.
        args: the configuration.
        train_dataset: pairs in any shape that :mod:`simpo.data` recognises, or already tokenized.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer; needed unless the data is tokenized.
        callbacks: as for ``Trainer``.
        optimizers: as for ``Trainer``.

    A step's loss is the sum of its pairs' losses over their global number, however it is split into micro-batches and
    over ranks. Overrides of ``Trainer``: how a batch is made (``get_train_dataloader``, ``get_eval_dataloader``), how
    its loss is computed (``compute_loss``, ``prediction_step``) and how micro-batches are looped (``training_step``).

    Raises:
        SimpoError: data or configuration that cannot be trained on.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: PreferenceConfig | None = None,  # type: ignore[valid-type]
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = PreferenceConfig() if args is None else args
        self.row, self.hyperparameters = args.row, args.hyperparameters
        if isinstance(model, str):
            model = load_model(model)
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=self._tokenized(train_dataset, processing_class, args, "train"),
            eval_dataset=_each(eval_dataset, lambda d, name: self._tokenized(d, processing_class, args, name)),
            processing_class=processing_class,
            compute_metrics=_mean_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.path = self._choose_path()
        self._sums = torch.zeros(len(NAMES), device=args.device)
        self._counted = 0.0

    # ---- data ----

    @staticmethod
    def _tokenized(
        dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str
    ) -> Dataset | None:
        if dataset is None:
            return None
        if "prompt_ids" not in dataset.column_names and tokenizer is None:
            raise SimpoError("processing_class: give the tokenizer, or tokenized data")
        prepared = prepare(dataset, tokenizer, args.tokenize_settings, label=label)
        rows, report = prepared.dataset, prepared.report
        if report.used < report.rows or report.cut:  # nothing is left out unsaid
            logger.warning("\n".join(report.lines()))
        if args.max_batch_tokens is not None:  # checked here, before anything is written
            check_budget(token_lengths(rows, padded=args.forward_path == "padded"), args.max_batch_tokens)
        counts = response_counts(rows)
        if (counts != 2).any():
            row = int(np.argmax(counts != 2))
            raise SimpoError(f"{label} row {row} has {counts[row]} responses; {args.objective!r} is trained on pairs")
        return rows

    def get_train_dataloader(self) -> DataLoader:
        """One element an optimizer step: this rank's micro-batches, by the plan that all ranks share."""
        if self.train_dataset is None:
            raise SimpoError("train_dataset: there is nothing to train on")
        plan = self._plan(self.train_dataset, self.args.train_batch_size, training=True)
        if plan.steps == 0:
            raise SimpoError(
                f"dataloader_drop_last: {len(self.train_dataset)} rows are fewer than the {plan.rows_per_step} of a "
                "step, so nothing would be trained; lower per_device_train_batch_size"
            )
        # the trainer's own step count says which epoch starts, also after a resume
        return self._loader(self.train_dataset, plan, lambda: self.state.global_step // max(plan.steps, 1))

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """Rows in their order, ``per_device_eval_batch_size`` a rank and element."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise SimpoError("eval_dataset: there is nothing to evaluate on")
        rows = self._tokenized(rows, self.processing_class, self.args, "eval")
        return self._loader(rows, self._plan(rows, self.args.eval_batch_size, training=False), lambda: 0)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As :meth:`get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def _plan(self, rows: Dataset, rows_per_device: int, *, training: bool) -> StepPlan:
        args = self.args
        lengths = token_lengths(rows, padded=self.path == "padded")
        budget = args.max_batch_tokens
        if budget is None:
            budget = max(16384 if args.device.type != "cpu" else 2048, int(lengths.max()))
        shuffled = training and args.train_sampling_strategy == "random"
        seed = args.seed if args.data_seed is None else args.data_seed
        return StepPlan(
            lengths=lengths,
            rows_per_step=rows_per_device * args.world_size,
            max_batch_tokens=budget,
            world_size=args.world_size,
            seed=seed if shuffled else None,
            drop_last=args.dataloader_drop_last and training,
            padded_rows=response_counts(rows) if self.path == "padded" else None,
        )

    def _loader(self, rows: Dataset, plan: StepPlan, epoch: Callable[[], int]) -> DataLoader:
        """Not prepared by accelerate: the plan has already shared the rows out, and none may be repeated."""
        args = self.args
        return DataLoader(
            ComparisonRows(rows),  # type: ignore[arg-type]
            batch_sampler=PlanSampler(plan, epoch, args.process_index),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )

    # ---- loss ----

    def _choose_path(self) -> ForwardPath:
        """Let the model prove the fast path on a few real pairs, in the precision that it will train in."""
        model = prepare_policy(self.model)
        rows = self.train_dataset if self.train_dataset is not None else _first(self.eval_dataset)
        if rows is None:
            return self.args.forward_path
        sample = PackedBatch.build(comparisons_of(rows, range(min(16, len(rows)))))
        with self.accelerator.autocast():
            choose_path(model, sample)
        return resolve_path(model, sample, self.args.forward_path)

    def compute_loss(  # noqa: D102 - documented by Trainer
        self,
        model: nn.Module,
        inputs: PlannedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = inputs.packed.to(self.args.device)
        y = policy_forward(model, batch, path=self.path)
        w, l = Responses(y.logp[0::2], y.length[0::2]), Responses(y.logp[1::2], y.length[1::2])  # noqa: E741
        losses = self.row.loss(w, l, **self.hyperparameters)  # [C]
        if self.args.sft_weight:
            losses = losses + self.args.sft_weight * sft_term(w)
        metrics = pair_metrics(self.row, self.hyperparameters, losses, w, l)
        # ranks' gradients are averaged, so each counts world_size times over the step's global number of pairs
        loss = (losses * batch.weights).sum() * (self.args.world_size / inputs.comparisons)
        return (loss, metrics) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of all micro-batches of one optimizer step; returns its loss, ``[]``."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()  # schedule-free optimizers
        total = torch.zeros((), device=self.args.device)
        batches = inputs["micro_batches"]
        for number, batch in enumerate(batches):
            with self._gradient_sync(model, last=number == len(batches) - 1):
                with self.compute_loss_context_manager():
                    loss, metrics = self.compute_loss(model, batch, return_outputs=True)
                self.accelerator.backward(loss)
            total += loss.detach()
            self._count(metrics, batch)
        return total

    @contextmanager
    def _gradient_sync(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Let ranks exchange gradients only after the last micro-batch (FSDP reduce-scatters each, to save memory)."""
        self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps when this is true
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        context: AbstractContextManager[None] = nullcontext()
        if not last and not sharded:
            context = self.accelerator.no_sync(model)
        with context:
            yield

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of one step on this rank: 6 a token and weight outside the embeddings, as transformers counts them."""
        tokens = sum(batch.packed.tokens for batch in inputs["micro_batches"])
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    # ---- metrics ----

    def _count(self, metrics: Tensor, batch: PlannedBatch) -> None:
        weights = batch.packed.weights  # on the CPU still, so counting waits for no device
        self._sums += weights.to(self._sums.device, non_blocking=True) @ metrics.to(self._sums.dtype)
        self._counted += float(weights.sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pairs' means since the last log, over all ranks, to the training log."""
        if "loss" in logs:
            counted = torch.tensor([self._counted], device=self._sums.device)
            sums = self.accelerator.reduce(torch.cat([self._sums, counted]), reduction="sum").tolist()
            *totals, pairs = sums
            logs |= {name: total / pairs for name, total in zip(NAMES, totals, strict=True) if name != "loss" and pairs}
            self._sums.zero_()
            self._counted = 0.0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Figures of an element's pairs, ``[rows, len(NAMES)]``, and their row numbers (-1 where a rank has fewer)."""
        capacity = self.args.eval_batch_size * self.args.world_size
        figures = torch.zeros(capacity, len(NAMES), device=self.args.device)
        rows = torch.full((capacity,), -1, device=self.args.device)
        filled = 0
        for batch in inputs["micro_batches"]:
            with torch.no_grad(), self.compute_loss_context_manager():
                _, metrics = self.compute_loss(model, batch, return_outputs=True)
            if batch.packed.weights.any():  # not a filler
                here = slice(filled, filled + len(batch.rows))
                figures[here], rows[here] = metrics.to(figures.dtype), torch.tensor(batch.rows, device=rows.device)
                filled += len(batch.rows)
        return None, figures, rows

    def score_pairs(self, dataset: Dataset) -> PairScores:
        """Figures of every pair of ``dataset``, in its order."""
        output = self.predict(dataset)
        real = output.label_ids >= 0
        order = np.argsort(output.label_ids[real])
        figures = output.predictions[real][order].astype(np.float64)
        return {name: figures[:, column] for column, name in enumerate(NAMES)}


def _mean_metrics(prediction: EvalPrediction) -> dict[str, float]:
    real = prediction.label_ids >= 0
    means = prediction.predictions[real].astype(np.float64).mean(axis=0)
    return {name: float(mean) for name, mean in zip(NAMES, means, strict=True)}


def _each(dataset: Any, function: Callable[[Dataset, str], Any]) -> Any:
    """``function(dataset, label)``, or of every one of several named data sets."""
    if isinstance(dataset, dict):
        return {name: function(part, name) for name, part in dataset.items()}
    return None if dataset is None else function(dataset, "eval")


def _first(dataset: Any) -> Dataset | None:
    return next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
