"""Preference training: the losses of comparisons and of single judged responses on packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from simpo.data.feedback import is_feedback, prepare_feedback
from simpo.data.tokenize import Prepared, check_rankings, prepare
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES, Objective, Responses, reference_point, sft_term
from simpo.packing.policy import policy_forward
from simpo.packing.reference import divergence_forward, mean_by_comparison
from simpo.training.batches import MISMATCHED_REF_LOGP, PlannedBatch
from simpo.training.config import PreferenceConfig
from simpo.training.metrics import KL, NAMES, UNPAIRED_NAMES, pair_metrics, unpaired_metrics
from simpo.training.packed import PackedTrainer
from simpo.training.reference_point import mismatched_rows, with_mismatched
from simpo.training.running_means import widest_type
from simpo.training.start_policy import StartPolicy


class PreferenceTrainer(PackedTrainer):
    """Trains a causal language model on comparisons, or on single responses with labels where the objective takes them.

    A step's loss is the mean over its comparisons. One with more than two responses has the mean over its ordered
    pairs, and the anchor term once, on the best response. The reference is the policy that training starts from: the
    model as it is given here, its adapter included. Arguments and errors are those of
    :class:`~simpo.training.packed.PackedTrainer`; ``args`` is a :data:`~simpo.training.config.PreferenceConfig`.
    """

    config_type = PreferenceConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._z_ref = torch.zeros(())
        self._precomputed = self.row.needs_reference and self.args.precompute_ref_log_probs
        beside = "kl_weight" if self.args.kl_weight else None
        if self.row.needs_reference and not self._precomputed:
            beside = "precompute_ref_log_probs"
        self._reference = StartPolicy(self, self.args.reference_cache, beside)
        if self._precomputed and self.args.reference_cache is not None:
            self._reference.open_cache()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of a row's figures."""
        names = UNPAIRED_NAMES if self._unpaired else NAMES
        return (*names, KL) if self.args.kl_weight else names

    @cached_property
    def row(self) -> Objective:
        """The configured objective."""
        return self.args.row

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """Its hyperparameters, defaults filled in."""
        return self.args.hyperparameters

    @cached_property
    def _unpaired(self) -> bool:
        """Whether responses are judged alone."""
        rows = next(iter(self._given_rows()), None)
        return rows is not None and "label" in rows.column_names

    def _given_rows(self) -> list[Dataset]:
        """Those that the trainer was made with, training rows first."""
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [rows for rows in (self.train_dataset, *held_out) if rows is not None]

    # ---- data ----

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize comparisons, or single responses with labels; for KTO with the column ``mismatched_ids``."""
        if is_feedback(dataset):
            if args.row.unpaired is None:
                takers = ", ".join(name for name, row in OBJECTIVES.items() if row.unpaired is not None)
                raise SimpoError(
                    f"{label}: single responses with labels, and {args.objective!r} is trained on pairs; unpaired "
                    f"feedback is for objective {takers}"
                )
            prepared = prepare_feedback(dataset, tokenizer, args.tokenize_settings, label=label)
        else:
            prepared = prepare(dataset, tokenizer, args.tokenize_settings, label=label)
            check_rankings(prepared.dataset, label)
        if not args.row.needs_z_ref:
            return prepared
        return replace(prepared, dataset=with_mismatched(prepared.dataset, args.max_length, label))

    def completed(self, rows: Dataset) -> Dataset:
        """With the reference's log-probabilities, where the objective needs them."""
        if ("label" in rows.column_names) != self._unpaired:
            raise SimpoError(
                "eval_dataset: comparisons and single responses with labels; give the same kind as to train"
            )
        return self._reference.completed(rows) if self._precomputed else rows

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's; what the reference has to say is asked before a checkpoint or a step moves the weights."""
        for rows in self._given_rows():
            self.completed(rows)
        self._reference.leave()
        return super().train(*args, **kwargs)

    # ---- KTO's reference point ----

    def before_step(self, model: nn.Module, batches: Sequence[PlannedBatch]) -> None:
        """KTO: estimate the reference point from all micro-batches of the step, over all ranks."""
        if not self.row.needs_z_ref:
            return
        total = torch.zeros((), dtype=widest_type(self.args.device), device=self.args.device)
        for batch in (batch.to(self.args.device) for batch in batches):
            assert batch.mismatched is not None
            with torch.no_grad(), self.accelerator.autocast():
                logps = policy_forward(self.model, batch.mismatched, path=self.path).logp
            reference = batch.mismatched_ref_logps
            if reference is None:
                reference = self._reference.logps(batch.mismatched)
            total += ((logps.to(total) - reference.to(total)) * batch.packed.weights).sum()
        self._settle_reference_point(self._sum_over_ranks(total) / batches[0].step_weight)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """As the base's; KTO's reference point is that of all rows that are evaluated."""
        if self.row.needs_z_ref:
            rows = dataloader.dataset.rows
            mismatched = mismatched_rows(rows)
            if self._precomputed:
                reference = torch.tensor(rows[MISMATCHED_REF_LOGP][:], dtype=torch.float64)
            else:
                reference = self._reference.response_logps(mismatched)
            logps = self.response_logps(mismatched)
            self._settle_reference_point((logps - reference.to(logps)).mean())
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _settle_reference_point(self, mean_ratio: Tensor) -> None:
        self._z_ref = reference_point(mean_ratio, self.hyperparameters["beta"])

    # ---- loss ----

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """As the base's, with the reference where one is needed."""
        if self.row.needs_reference and batch.ref_logps is None:
            batch = batch._replace(ref_logps=self._reference.logps(batch.packed))
        if self.args.kl_weight:
            return self._penalised_rows(model, batch)
        return super().forward_rows(model, batch)

    def _penalised_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """With KL(policy || reference), the mean over the scored tokens of a comparison, added and logged."""
        reference = self._reference.states(batch.packed)
        y, divergence = divergence_forward(model, batch.packed, reference, path=self.path)
        losses, figures = self.row_figures(y, batch)
        kl = mean_by_comparison(batch.packed, divergence)  # [C]
        losses = losses + self.args.kl_weight * kl
        return losses, torch.cat([losses.detach()[:, None], figures[:, 1:], kl.detach()[:, None]], dim=1)

    def row_figures(self, y: Responses, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Losses, ``[C]``, and figures of comparisons or of responses that are judged alone."""
        context = self.hyperparameters | ({"z_ref": self._z_ref} if self.row.needs_z_ref else {})
        if batch.ref_logps is not None:
            y = replace(y, ref_logp=batch.ref_logps.to(y.logp))
        if batch.labels is not None:
            return self._unpaired_figures(y, batch.labels, context)
        pairs = batch.pairs
        w, l, best = (_taken(y, index) for index in (pairs.better, pairs.worse, pairs.best))  # noqa: E741
        losses = pairs.mean(self.row.pair(w, l, **context))
        if self.row.anchor is not None:
            losses = losses + self.row.anchor(best, **context)
        if self.args.sft_weight:
            losses = losses + self.args.sft_weight * sft_term(best)
        figures = pairs.mean(pair_metrics(self.row, self.hyperparameters, w, l))
        return losses, torch.cat([losses.detach()[:, None], figures], dim=1)

    def _unpaired_figures(self, y: Responses, labels: Tensor, context: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of responses that are judged alone; an SFT term is that of the desirable ones."""
        assert self.row.unpaired is not None
        losses = self.row.unpaired(y, labels, **context)
        if self.args.sft_weight:
            losses = losses + self.args.sft_weight * sft_term(y).masked_fill(~labels, 0)
        figures = unpaired_metrics(self.row, self.hyperparameters, y, labels)
        return losses, torch.cat([losses.detach()[:, None], figures], dim=1)


def _taken(y: Responses, index: Tensor) -> Responses:
    """The responses with these numbers, ``[N]``."""
    columns = (y.logp, y.length, y.ref_logp)
    return Responses(*(None if column is None else column.index_select(0, index) for column in columns))
