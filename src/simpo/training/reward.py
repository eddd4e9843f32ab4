"""``RewardTrainer``: trains reward models (transformers classifiers with one label) on all pairs of responses."""

# ruff: noqa: D102 - the base class documents the methods

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simpo.data.formats import SCORE_COLUMNS
from simpo.data.images import COLUMNS as IMAGE_COLUMNS
from simpo.data.images import text_tokenizer
from simpo.data.tokenizing import Prepared, is_feedback, prepare
from simpo.data.verification import check_rankings
from simpo.errors import SimpoError
from simpo.models.reward import choose_padding, load_reward_model
from simpo.models.settings import ModelArguments
from simpo.objectives.preference import bradley_terry, centering
from simpo.packing.model import is_reward_model, reward_forward
from simpo.runs.results import Metric
from simpo.training.batches import LEVELS, ComparisonRows, PlannedBatch, response_counts
from simpo.training.configs import RewardConfig
from simpo.training.metrics import LENGTHS, MARGINS, WEIGHT, Scores, compare_rewards
from simpo.training.packed import Description, PackedTrainer

_ROWS_PER_BATCH = 256  # rows whose pairs are compared at a time


class RewardTrainer(PackedTrainer):
    """Trains a sequence classifier with one label to give the better response the higher reward.

    The loss of a step is the mean over its comparisons; a comparison's loss is the mean over its ordered pairs.
    Arguments and errors are those of :class:`~simpo.training.packed.PackedTrainer`; given the name of a language model,
    it trains that model with a randomly initialized head.
    """

    metric_names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    config_type = RewardConfig
    command, row_noun, pipeline, takes_images = "reward", "comparisons", "text-classification", True

    def __init__(self, model: PreTrainedModel | PeftModel | str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, str) and not is_reward_model(model):
            raise SimpoError(
                f"model: {type(model).__name__} is not a reward model; load it with AutoModelForSequenceClassification "
                "and num_labels=1"
            )
        super().__init__(model, *args, **kwargs)
        if self.processing_class is not None:
            choose_padding(self.model, text_tokenizer(self.processing_class))

    @classmethod
    def load(cls, model: str | ModelArguments) -> PreTrainedModel | PeftModel:
        """Load a reward model, or a language model with a random head instead of its output layer."""
        return load_reward_model(model, new_head=True)

    @classmethod
    def describe(cls, args: Any) -> Description:
        return Description(
            f"Bradley-Terry likelihood of the preferences (margin: {args.margin})",
            "trained as a **reward model** with the Bradley-Terry likelihood",
            ["simpo", "reward-model"],
        )

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize comparisons; with margins, also add the column :data:`~simpo.training.batches.LEVELS`."""
        if is_feedback(dataset):
            raise SimpoError(f"{label}: reward models need comparisons, but these rows are labeled single responses")
        prepared = prepare(dataset, tokenizer, args.tokenize_settings, label=label)
        rows = prepared.dataset
        check_rankings(rows, label)
        if args.margin == "none":
            extras = rows["extra"] if "extra" in rows.column_names else ()
            if any('"margin"' in extra and "margin" in json.loads(extra) for extra in extras):
                prepared.report.notices.append("the margin column is not used; margin: column subtracts it in the loss")
        elif LEVELS not in rows.column_names:
            columns = [name for name in ("response_ids", "scores", "extra", "where") if name in rows.column_names]
            levels = [
                _levels(row, args.margin, str(row.get("where", f"{label} row {number}")))
                for number, row in enumerate(rows.select_columns(columns))
            ]
            rows = rows.add_column(LEVELS, levels, feature=List(Value("float64")))
        return replace(prepared, dataset=rows)

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        return self.loss_and_metrics(reward_forward(model, batch.packed, path=self.path), batch)

    def loss_and_metrics(self, y: Tensor, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Return losses and metrics as in the base class; ``y`` are the rewards of the responses, ``[R]``."""
        pairs = batch.pairs
        chosen, rejected = y[pairs.better], y[pairs.worse]
        margin = 0.0 if batch.levels is None else (batch.levels[pairs.better] - batch.levels[pairs.worse]).to(y)
        losses = bradley_terry(chosen, rejected, margin)
        if self.args.center_rewards_coefficient:
            losses = losses + self.args.center_rewards_coefficient * centering(chosen, rejected)
        metrics = torch.stack([losses, chosen, rejected, (chosen > rejected).to(y), chosen - rejected], dim=-1)
        return pairs.mean(losses), pairs.mean(metrics.detach())

    def compare(self, before: Scores, after: Scores) -> list[Metric]:
        return compare_rewards(before, after)

    def score_rows(self, dataset: Dataset) -> Scores:
        """Score rows as in the base class, plus the margin and length difference, in tokens, of all ordered pairs.

        Both are ``[rows, N]``, with NaN where a row has fewer than ``N`` pairs.
        """
        rows: Any = self._tokenize(dataset, self.processing_class, self.args, "eval")
        rewards = self.compute_for_responses(
            rows, lambda batch: reward_forward(self.model, batch, path=self.path)
        ).cpu()
        plain = rows.select_columns([name for name in rows.column_names if name not in IMAGE_COLUMNS])
        comparisons, counts = ComparisonRows(plain), response_counts(rows).tolist()
        metrics, margins, lengths = [], [], []
        numbers = range(len(rows))
        parts = [numbers[start : start + _ROWS_PER_BATCH] for start in range(0, len(rows), _ROWS_PER_BATCH)]
        sizes = [sum(counts[row] for row in part) for part in parts]
        for part, y in zip(parts, rewards.split(sizes), strict=True):
            batch = comparisons.unplanned_batch(part)
            metrics.append(self.loss_and_metrics(y, batch)[1])
            pairs = batch.pairs
            pair_counts = torch.bincount(pairs.comparison, minlength=len(part)).tolist()
            margins += (y[pairs.better] - y[pairs.worse]).split(pair_counts)
            lengths += (batch.packed.lengths[pairs.better] - batch.packed.lengths[pairs.worse]).to(y).split(pair_counts)
        scores = dict(zip(self.metric_names, torch.cat(metrics).double().numpy().T, strict=True))
        for name, differences in ((MARGINS, margins), (LENGTHS, lengths)):
            scores[name] = pad_sequence(differences, batch_first=True, padding_value=math.nan).double().numpy()
        return scores | {WEIGHT: np.ones(len(rows))}


def _levels(row: Mapping[str, Any], margin: str, where: str) -> list[float]:
    """Return a level for each response; the difference between two levels is the margin one should win by."""
    if margin == "scores" and row.get("scores") is not None:
        return row["scores"]
    if len(row["response_ids"]) > 2:
        raise SimpoError(
            f"{where}: margin: column needs pairs, but this row has more than two responses; set margin: scores"
        )
    extra = json.loads(row.get("extra") or "{}")
    names = [("margin",)] if margin == "column" else [pair for pair in SCORE_COLUMNS if pair[0] in extra]
    values = [extra.get(name) for name in (names[0] if names else SCORE_COLUMNS[0])]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        wanted = "column margin" if margin == "column" else "columns chosen_score and rejected_score"
        raise SimpoError(f"{where}: margin: {margin} needs a number in the {wanted}")
    levels = [*map(float, values), 0.0][:2]
    if levels[0] < levels[1]:
        raise SimpoError(f"{where}: margin: must be at least 0, not {levels[0] - levels[1]:g}")
    return levels
