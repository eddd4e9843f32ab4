"""``PreferenceTrainer``: preference objectives on packed batches, and their metrics."""

# ruff: noqa: D102 - the base class documents the methods

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Value
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from simpo.data.tokenizing import Prepared, is_feedback, prepare, prepare_feedback
from simpo.data.verification import check_rankings
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES, Objective, Responses, reference_point, sft_term
from simpo.objectives.objective import NON_NEGATIVE, POSITIVE, Bound
from simpo.packing.layout import PackedBatch
from simpo.packing.model import policy_forward, policy_logprobs, responses_of
from simpo.packing.scoring import mean_by_comparison, token_outputs
from simpo.runs.results import Metric
from simpo.training.batches import (
    BETA,
    LABEL_PROBABILITY,
    MARGIN,
    MISMATCHED_REF_LOGP,
    WEIGHT,
    OrderedPairs,
    PlannedBatch,
    describe_rows,
    response_counts,
    widest_float,
)
from simpo.training.configs import PreferenceConfig
from simpo.training.metrics import Scores, compare_preferences
from simpo.training.packed import Description, PackedTrainer
from simpo.training.reference import ReferenceModel, mismatched_rows, with_mismatched

# Metrics of pairs and of single responses, under the names that dashboards already use.
NAMES = (
    "loss",
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip
UNPAIRED_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
KL, WPO_WEIGHT = "kl", "wpo/weight"


class PreferenceTrainer(PackedTrainer):
    """Trains a causal language model on comparisons or, if the objective supports it, on labeled single responses.

    The loss of a step is the mean over its comparisons. With more than two responses, a comparison's pair term is the
    mean over its ordered pairs, and its anchor term applies once, to the best response. The reference is the policy at
    the start of training: the given model, including its adapter. Arguments and errors are those of
    :class:`~simpo.training.packed.PackedTrainer`; ``args`` is a :class:`PreferenceConfig`.
    """

    config_type = PreferenceConfig
    command, row_noun, takes_images = "train", "pairs", True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._context: dict[str, Tensor] = {}  # other inputs of the objective, such as KTO's reference point
        needs_reference = self.objective.needs_reference
        self._precomputed = needs_reference and self.args.precompute_ref_log_probs
        copy_weights = bool(self.args.kl_weight) or (needs_reference and not self._precomputed)
        cache = self.args.reference_cache if self._precomputed else None
        self._reference = ReferenceModel(self, cache, copy_weights=copy_weights)

    @property
    def metric_names(self) -> tuple[str, ...]:
        names = UNPAIRED_NAMES if self._unpaired else NAMES
        return (*names, *([KL] if self.args.kl_weight else []), *([WPO_WEIGHT] if self.args.wpo_weights else []))

    @cached_property
    def objective(self) -> Objective:
        """The objective with the configured hyperparameters."""
        return self.args.row.with_hyperparameters(**self.args.hyperparameters)

    @cached_property
    def _unpaired(self) -> bool:
        """Whether the rows are single responses."""
        rows = next(iter(self._all_rows()), None)
        return rows is not None and "label" in rows.column_names

    @classmethod
    def describe(cls, args: Any) -> Description:
        weights = {
            key: getattr(args, key)
            for key in ("sft_weight", "kl_weight", "wpo_weights", "row_columns")
            if getattr(args, key)
        }
        settings = ", ".join(f"{key} {value}" for key, value in (args.hyperparameters | weights).items())
        names = [args.objective] if isinstance(args.objective, str) else args.objective
        return Description(
            f"{args.row.name} ({settings})" if settings else args.row.name,
            f"aligned by **{args.row.name}** ({args.row.paper})",
            ["simpo", "preference-optimization", *names],
        )

    def compare(self, before: Scores, after: Scores) -> list[Metric]:
        return compare_preferences(before, after, has_reference=self.objective.needs_reference)

    # ---- Data.

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize comparisons or labeled single responses; for KTO, also add the column ``mismatched_ids``."""
        if is_feedback(dataset):
            if not args.row.takes_unpaired:
                takers = ", ".join(name for name, row in OBJECTIVES.items() if row.takes_unpaired)
                raise SimpoError(
                    f"{label}: objective {args.row.name!r} needs pairs, but these rows are labeled single responses; "
                    f"use objective {takers}"
                )
            if args.wpo_weights:
                raise SimpoError(f"wpo_weights: {label}: applies to pairs, not to single responses; leave it out")
            prepared = prepare_feedback(dataset, tokenizer, args.tokenize_settings, label=label)
        else:
            prepared = prepare(dataset, tokenizer, args.tokenize_settings, label=label)
            check_rankings(prepared.dataset, label)
        if args.ld_alpha is not None and (others := np.flatnonzero(response_counts(prepared.dataset) != 2)).size:
            places = describe_rows(prepared.dataset, others.tolist())
            raise SimpoError(f"ld_alpha: {label}: applies only to pairs; rows without exactly two responses: {places}")
        names = args.row_columns or ()
        if MARGIN in args.row.row_columns and MARGIN not in names and has_column(prepared.dataset, MARGIN):
            prepared.report.notices.append("the margin column is not used; row_columns: [margin] adds it to gamma")
        prepared = with_row_columns(prepared, names, label, training=label == "train")
        if "z_ref" not in args.row.needs:
            return prepared
        return replace(prepared, dataset=with_mismatched(prepared.dataset, args.max_length, label))

    def row_weights(self, rows: Dataset) -> np.ndarray | None:
        """Return the column ``weight``, which held-out rows do not have."""
        return np.array(rows[WEIGHT][:]) if WEIGHT in rows.column_names else None

    def add_columns(self, rows: Dataset) -> Dataset:
        """Add the reference's log-probabilities if the objective needs them."""
        if ("label" in rows.column_names) != self._unpaired:
            raise SimpoError("eval_dataset: must hold comparisons or labeled single responses, as train_dataset does")
        return self._reference.add_logps(rows) if self._precomputed else rows

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate and freeze the reference before a checkpoint or a step changes the weights, then train."""
        for rows in self._all_rows():
            self.add_columns(rows)
        self._reference.freeze()
        return super().train(*args, **kwargs)

    # ---- KTO's reference point and BCO's reward shift.

    def before_step(self, model: nn.Module, batches: Sequence[PlannedBatch]) -> None:
        """Update BCO's reward shift, and estimate KTO's reference point from the whole step over all ranks."""
        self._update_shift()
        if "z_ref" not in self.objective.needs:
            return
        total = torch.zeros((), dtype=widest_float(self.args.device), device=self.args.device)
        for batch in (batch.to(self.args.device) for batch in batches):
            assert batch.mismatched is not None
            with torch.no_grad(), self.accelerator.autocast():
                logps = policy_forward(self.model, batch.mismatched, path=self.path).logp
            reference = batch.mismatched_ref_logps
            if reference is None:
                reference = self._reference.logps(batch.mismatched)
            total += ((logps.to(total) - reference.to(total)) * batch.packed.weights).sum()
        self._update_reference_point(self._sum_over_ranks(total) / batches[0].step_weight)

    def _scores(self, dataloader: DataLoader) -> Scores:
        """Score rows as in the base class, with KTO's reference point estimated from all rows being evaluated."""
        self._update_shift()
        if "z_ref" in self.objective.needs:
            rows = dataloader.dataset.rows  # type: ignore[attr-defined]
            mismatched = mismatched_rows(rows)
            if self._precomputed:
                reference = torch.tensor(rows[MISMATCHED_REF_LOGP][:], dtype=torch.float64)
            else:
                reference = self._reference.response_logps(mismatched)
            logps = self.response_logps(mismatched)
            self._update_reference_point((logps - reference.to(logps)).mean())
        return super()._scores(dataloader)

    def _update_reference_point(self, mean_ratio: Tensor) -> None:
        beta = self.objective.part_that_needs("z_ref").beta  # type: ignore[attr-defined]
        self._context["z_ref"] = reference_point(mean_ratio, beta)

    def _update_shift(self) -> None:
        """Set BCO's reward shift from the logged rewards of all earlier steps, over all ranks.

        Their sums are stored in checkpoints.
        """
        if "reward_shift" in self.objective.needs:
            means = [self._means.running(f"rewards/{side}", self._sum_over_ranks) for side in ("chosen", "rejected")]
            self._context["reward_shift"] = (means[0] + means[1]) / 2

    # ---- Loss.

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Return losses and metrics, adding reference log-probabilities, WPO weights and KL(policy || reference)."""
        args, packed = self.args, batch.packed
        if self.objective.needs_reference and batch.ref_logps is None:
            batch = batch._replace(ref_logps=self._reference.logps(packed))
        if not args.kl_weight and not args.wpo_weights:
            return super().forward_rows(model, batch)
        reference = self._reference.states(packed) if args.kl_weight else None
        outputs = token_outputs(model, packed, reference=reference, log_collision=args.wpo_weights, path=self.path)
        weights, added = None, []
        if outputs.log_collision is not None:
            weights = wpo_weights(responses_of(packed, outputs.logps - outputs.log_collision), batch.pairs)
        losses, metrics = self.loss_and_metrics(self._desensitized(packed, outputs.logps), batch, weights)
        if outputs.divergence is not None:
            added.append(mean_by_comparison(packed, outputs.divergence))  # [C], over the scored tokens of a comparison
            losses = losses + args.kl_weight * added[0]
        if weights is not None:
            added.append(batch.pairs.mean(weights))
        return losses, torch.stack([losses, *metrics[:, 1:].unbind(1), *added], dim=1).detach()

    def responses(self, model: nn.Module, packed: PackedBatch) -> Responses:
        """Return the responses' log-probabilities, with tokens weighted by ``ld_alpha``."""
        return self._desensitized(packed, policy_logprobs(model, packed, path=self.path))

    def _desensitized(self, packed: PackedBatch, token_logps: Tensor) -> Responses:
        """Sum the log-probabilities ``[S]`` of the scored tokens over each response.

        With ``ld_alpha``, tokens beyond the length of a pair's shorter response are multiplied by it, for both the
        policy and the reference (LD-DPO, arXiv 2409.06411).
        """
        if self.args.ld_alpha is not None:
            lengths, owner = packed.lengths.to(token_logps.device), packed.response_of.to(token_logps.device)
            spans = packed.layout.spans  # two responses each, or one when scoring single responses
            row = torch.arange(len(spans)).repeat_interleave(torch.tensor([len(span.responses) for span in spans]))
            row = row.to(lengths.device)
            shared = lengths.new_zeros(len(spans)).scatter_reduce(0, row, lengths, "amin", include_self=False)[row]
            place = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
            token_logps = torch.where(place < shared[owner], token_logps, self.args.ld_alpha * token_logps)
        return responses_of(packed, token_logps)

    def loss_and_metrics(
        self, y: Responses, batch: PlannedBatch, pair_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return losses ``[C]`` and metrics for comparisons or single responses.

        ``pair_weights`` ``[N]`` scale the pair terms of the loss. The SFT term applies to the best response of a
        comparison and to desirable single responses.
        """
        context = {name: value.to(y.logp) for name, value in self._context.items()}
        if batch.ref_logps is not None:
            y = replace(y, ref_logp=batch.ref_logps.to(y.logp))
        if batch.labels is not None:
            losses = self.objective.unpaired(y, batch.labels, **context)
            if self.args.sft_weight:
                losses = losses + self.args.sft_weight * sft_term(y).masked_fill(~batch.labels, 0)
            metrics = unpaired_metrics(self.objective, y, batch.labels)
        else:
            pairs = batch.pairs
            w, l, best = (y.take(index) for index in (pairs.better, pairs.worse, pairs.best))  # noqa: E741
            values = {LABEL_PROBABILITY: batch.label_probability, MARGIN: batch.margin, BETA: batch.beta}
            given = {name: value.to(y.logp)[pairs.comparison] for name, value in values.items() if value is not None}
            objective = self.objective.with_row_columns(**given)
            weighted = pairs if pair_weights is None else pairs.weighted(pair_weights)
            if "scores" in objective.needs and batch.scores is not None:
                context["scores"] = batch.scores  # not rounded, because a low temperature would amplify the error
            losses, anchor = objective.comparisons(y, weighted, **context), objective.anchor(best)
            if anchor is not None:
                losses = losses + anchor
            if self.args.sft_weight:
                losses = losses + self.args.sft_weight * sft_term(best)
            metrics = pairs.mean(pair_metrics(objective, w, l))
        return losses, torch.cat([losses.detach()[:, None], metrics], dim=1)


def wpo_weights(y: Responses, pairs: OrderedPairs) -> Tensor:
    """Return pair weights ``[N]``, at most 1: how likely both responses are under the policy (WPO, arXiv 2406.11827).

    A response contributes ``exp`` of the mean over its tokens of ``log p(token) - log sum_v p(v)**2``, which is about
    1 for the policy's own answers. The upper bound comes from the authors' code; TRL has none.

    Args:
        y: ``y.logp`` ``[R]`` is the sum of these differences over a response's tokens.
        pairs: the ordered pairs.
    """
    aligned = y.avg.detach()
    return (aligned[pairs.better] + aligned[pairs.worse]).exp().clamp(max=1)


def pair_metrics(objective: Objective, w: Responses, l: Responses) -> Tensor:  # noqa: E741
    """Return detached metrics ``[B, 6]`` of ``B`` pairs: those of :data:`NAMES` without the loss.

    As in the paper's curves, ``logps/*`` are averages over a response's tokens for length-normalized objectives and
    sums for all others.
    """
    chosen, rejected = objective.reward(w), objective.reward(l)
    correct = (chosen > rejected).to(chosen.dtype)
    columns = (chosen, rejected, correct, chosen - rejected, _logged_logp(objective, w), _logged_logp(objective, l))
    return torch.stack(columns, dim=-1).detach()


def unpaired_metrics(objective: Objective, y: Responses, label: Tensor) -> Tensor:
    """Return detached metrics ``[B, 4]`` of ``B`` single responses: those of :data:`UNPAIRED_NAMES` without the loss.

    Desirable responses (``label`` ``[B]``) have the ``chosen`` metrics and undesirable ones the ``rejected`` metrics;
    the others are NaN.
    """
    values = (objective.reward(y), _logged_logp(objective, y))
    columns = [value.masked_fill(hidden, torch.nan) for value in values for hidden in (~label, label)]
    return torch.stack(columns, dim=-1).detach()


def _logged_logp(objective: Objective, y: Responses) -> Tensor:
    return y.avg if objective.average_logps else y.logp


# ---- Data columns that change a row's loss: weight, label probability, margin and beta.

ROW_COLUMNS = {
    WEIGHT: NON_NEGATIVE,
    LABEL_PROBABILITY: Bound("must be in [0, 1]", lambda value: 0 <= value <= 1),
    MARGIN: NON_NEGATIVE,
    BETA: POSITIVE,
}


def with_row_columns(prepared: Prepared, names: Sequence[str], label: str, *, training: bool) -> Prepared:
    """Add the columns ``names`` from the original data to tokenized rows, and check their values.

    Weights are only used for training: held-out rows count equally. Rows with weight 0 are dropped and counted. Any
    other column may be missing from the held-out rows, but only from all of them.
    """
    rows, report = prepared.dataset, prepared.report
    rows = rows.remove_columns([name for name in ROW_COLUMNS if name in rows.column_names and name not in names])
    if not names:
        return replace(prepared, dataset=rows)
    wheres = rows["where"][:] if "where" in rows.column_names else [f"{label} row {row}" for row in range(len(rows))]
    counts = pc.list_value_length(rows.with_format("arrow")["response_ids"]).to_pylist()
    for name in names:
        report.ignored = {key: count for key, count in report.ignored.items() if not key.startswith(f"column {name!r}")}
        values = _values(rows, name)
        if name in rows.column_names:
            rows = rows.remove_columns(name)
        if not training and (name == WEIGHT or all(value is None for value in values)):
            if name != WEIGHT:
                report.notices.append(f"no row has a {name}; evaluating the loss without it")
            continue
        for where, count, value in zip(wheres, counts, values, strict=True):
            _check(name, value, where)
            if count != 2 and name != WEIGHT:
                found = "a single response" if count == 1 else f"{count} responses"
                raise SimpoError(f"{where}: row_columns: {name} applies to pairs, but this row has {found}")
        rows = rows.add_column(name, list(map(float, values)), feature=Value("float64"))
    if training and WEIGHT in names:
        weighted = np.flatnonzero(np.array(rows[WEIGHT][:]))
        if not len(weighted):
            raise SimpoError(f"{label}: weight: 0 in every row; nothing would be trained")
        for row in np.setdiff1d(np.arange(len(rows)), weighted):
            report.drop("weight 0", wheres[row])
        rows = rows.select(weighted) if len(weighted) < len(rows) else rows
    return replace(prepared, dataset=rows)


def has_column(rows: Dataset, name: str) -> bool:
    """Return whether any row has a value for ``name``."""
    return any(value is not None for value in _values(rows, name))


def _values(rows: Dataset, name: str) -> list[Any]:
    """Return each row's value for ``name``, from its column or from the data's extra columns."""
    if name in rows.column_names:
        return rows[name][:]
    extras = rows["extra"][:] if "extra" in rows.column_names else ["{}"] * len(rows)
    return [json.loads(extra).get(name) if f'"{name}"' in extra else None for extra in extras]


def _check(name: str, value: Any, where: str) -> None:
    if value is None:
        raise SimpoError(f"{where}: {name} is missing; row_columns requires it in every row")
    bound = ROW_COLUMNS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SimpoError(f"{where}: {name}: {value!r} is not a finite number")
    if not bound.holds(value):
        raise SimpoError(f"{where}: {name} {bound.text}, not {value!r}")
