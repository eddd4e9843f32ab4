"""``OnlineTrainer``: trains on answers the model samples during training and an annotator scores."""

# ruff: noqa: D102 - the base class documents the methods

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from simpo.data.prompts import prepare_prompts
from simpo.data.rows import DataReport
from simpo.data.tokenizing import TOKENS, Prepared, prepare_sft
from simpo.errors import SimpoError
from simpo.generation.engine import Engine
from simpo.models.checkpoint import Limits
from simpo.models.settings import ModelArguments
from simpo.objectives.policy_gradient import Rollout, kl_estimate, mean_by, sum_by
from simpo.objectives.ppo import explained_variance, value_loss
from simpo.packing.scoring import TokenOutputs, token_outputs
from simpo.runs.results import Metric
from simpo.statistics import mean_interval
from simpo.training.batches import (
    CONTENT,
    RETURNS,
    ROLLOUT,
    VALUES,
    ComparisonRows,
    PlannedBatch,
    collate,
    comparisons_of,
    describe_rows,
    response_counts,
    response_tokens,
    rows_digest,
)
from simpo.training.configs import OnlineConfig
from simpo.training.metrics import Scores
from simpo.training.packed import Description
from simpo.training.preference import NAMES, PreferenceTrainer
from simpo.training.reference import policy_fingerprint
from simpo.training.rollouts import (
    ROLLOUT_NAMES,
    Annotator,
    RolloutFiles,
    Schedule,
    StepPosition,
    training_rows,
)
from simpo.training.settings import settings_identity
from simpo.training.sft import PTX, Pretraining
from simpo.training.value import ValueFunction

logger = logging.getLogger(__name__)

_PLACEHOLDER_TOKENS, _VALUE_CHECK_ROWS = 8, 2  # length of placeholder answers; rows a value network is checked on
# For policy gradients: mean importance ratio, share of clipped tokens, entropy per token (exact if entropy_coef needs
# it, otherwise estimated as the negative log-probability), and the loss of PPO's value function.
_POLICY_NAMES = ("policy/ratio", "policy/clip_fraction", "policy/entropy", "value/loss")
_STALENESS = "rollout/staleness"  # optimizer steps since the answers were sampled


class OnlineTrainer(PreferenceTrainer):
    """Trains a causal language model on its own answers.

    Every ``sync_every`` steps the model answers the next prompts, ``annotator`` scores the answers, and they are
    written to a file in the ``rollouts`` folder before training on them. A resumed run reads existing files, so nothing
    is sampled twice and the result is bit-identical. Training rows are prompts; held-out rows are pairs. Other
    arguments and errors are those of :class:`~simpo.training.packed.PackedTrainer`.

    Args:
        annotator: scores the answers; can also be set as an attribute before training.
        gold_annotator: scores the same answers for ``rollout/gold``, which does not affect training.
        engine: samples answers from the current model (default: the engine in the configuration).
        loading: how the model was loaded; its ``trust_remote_code`` and ``allow_pickle`` also apply to ``value_model``
            and to reloading an adapter's base model.
    """

    config_type = OnlineConfig  # type: ignore[assignment]
    command, row_noun, takes_images, takes_loading = "online", "prompts", False, True

    def __init__(
        self,
        *args: Any,
        annotator: Annotator | None = None,
        gold_annotator: Annotator | None = None,
        engine: Engine | None = None,
        loading: ModelArguments | None = None,
        **kwargs: Any,
    ) -> None:
        self._value: ValueFunction | None = None
        self._ptx: Pretraining | None = None
        self._created_optimizer = False
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            raise SimpoError("deepspeed: cannot sample answers between steps; use fsdp, or simpo loop")
        self._gradient = self.args.gradient
        if self._gradient is not None:
            self._reference.keep_copy()  # for the KL divergence
            if self.args.ppo is not None:
                if self.optimizer is not None and not self._created_optimizer:
                    raise SimpoError("optimizers: ppo needs to add its value function to the optimizer; leave this out")
                self._value = ValueFunction(self.model, self.args, self.processing_class, loading)
            if self.args.ptx_dataset_name is not None:
                self._ptx = Pretraining(self, self.args.ptx_dataset_name)
                self._other_means["ptx"] = self._ptx.means
            if (self.args.temperature, self.args.top_p, self.args.top_k) != (1, 1, 0):
                logger.warning(
                    "temperature, top_p, top_k: policy gradients are biased unless answers are sampled from the "
                    "model's own distribution (1, 1, 0)"
                )
        self.annotator, self.gold_annotator = annotator, gold_annotator
        self._files = RolloutFiles(self, self._reference, self._value, engine, loading)
        self._rollout: tuple[int, Dataset] | None = None  # number and rows of the current rollout
        self._kl_coef, self._explained_variance = self.args.kl_coef, math.nan  # for the current rollout
        self._staleness, self._denominator = 0, 1.0
        self._logged_at = time.monotonic()
        if self.train_dataset is not None:
            self._check_room(self.train_dataset)
            self._check_horizon()
            if self._value is not None and self._value.head is None:
                with self.accelerator.autocast():
                    self._value.check(
                        comparisons_of(self.train_dataset, range(len(self.train_dataset))[:_VALUE_CHECK_ROWS])
                    )

    def _check_room(self, rows: Dataset) -> None:
        limits = [Limits.of(self.model.config).positions]
        if self._value is not None and self._value.head is None:
            limits.append(Limits.of(self._value.module.config).positions)
        limit, longest = min((known for known in limits if known is not None), default=None), self.args.max_new_tokens
        too_long = [row for row, ids in enumerate(rows["prompt_ids"]) if limit and len(ids) + longest > limit]
        if too_long:
            raise SimpoError(
                f"{describe_rows(rows, too_long)}: the prompt plus an answer of max_new_tokens {longest} exceeds the "
                f"{limit:,} positions of the model (or of value_model); set max_length to {limit} or less"
            )

    def _check_horizon(self) -> None:
        args, schedule = self.args, self._schedule
        if args.kl_target is None:
            return
        prompts = min(schedule.prompts, schedule.per_step * (args.sync_every // args.rollout_epochs))
        answers = prompts * args.num_generations
        if answers >= 5 * args.kl_horizon:  # a rollout changes the coefficient by up to answers / (5 * kl_horizon)
            raise SimpoError(
                f"kl_horizon: {args.kl_horizon} is too short: a rollout of {answers:,} answers could make kl_coef "
                f"negative; set it to {answers:,} or more"
            )

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, *_POLICY_NAMES, *ROLLOUT_NAMES, _STALENESS)

    @property
    def evaluated_names(self) -> tuple[str, ...]:
        return super().metric_names  # held-out rows are pairs, not rollouts

    @classmethod
    def describe(cls, args: Any) -> Description:
        sampling = "on-policy" if args.sync_every == 1 else f"answers sampled every {args.sync_every} steps"
        gradient = args.gradient
        if gradient is None:
            offline = super().describe(args)
            return offline._replace(objective=f"{offline.objective}, {sampling}", tags=[*offline.tags, "online"])
        settings = f"kl_coef {args.kl_coef:g} in the {args.kl_in}, {args.kl_estimator}"
        return Description(
            f"{args.objective} ({settings}), {sampling}",
            f"trained by **{args.objective}** ({gradient.paper}) on its own answers",
            ["simpo", "reinforcement-learning", args.objective],
        )

    # ---- Prompts.

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize the prompts to train on, or held-out pairs as in the base class.

        Prompts get placeholder answers of random tokens, which are used to check the packed forward pass.
        """
        if label == PTX:
            return prepare_sft(dataset, tokenizer, args.tokenize_settings, label=label)
        if label != "train":
            return super().prepare(dataset, tokenizer, args, label)
        if CONTENT in dataset.column_names:
            return Prepared(dataset, DataReport(label, len(dataset), len(dataset), noun="prompts"))
        assert tokenizer is not None  # checked by the base class
        room, rendering = args.max_length - args.max_new_tokens, args.tokenize_settings.rendering
        prompts = prepare_prompts(dataset, tokenizer, label=label, max_prompt_length=room, rendering=rendering)
        tokens = sorted({token for prompt in prompts for token in prompt.ids})
        size = (len(prompts), args.num_generations, _PLACEHOLDER_TOKENS)
        answers = np.random.default_rng(0).choice(tokens, size).tolist()
        columns = {
            "prompt_ids": [prompt.ids for prompt in prompts],
            "response_ids": answers,
            "where": [prompt.where for prompt in prompts],
            CONTENT: [json.dumps(asdict(prompt)) for prompt in prompts],
        }
        text = Value("string")
        kinds = Features({"prompt_ids": TOKENS, "response_ids": List(TOKENS), "where": text, CONTENT: text})
        return Prepared(Dataset.from_dict(columns, features=kinds), prompts.report)

    @cached_property
    def _schedule(self) -> Schedule:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return Schedule(
            prompts=len(self.train_dataset),
            per_step=args.train_batch_size * args.world_size,
            sync_every=args.sync_every,
            rollout_epochs=args.rollout_epochs,
            seed=seed if args.train_sampling_strategy == "random" else None,
            drop_last=args.dataloader_drop_last,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader with one element per optimizer step, created on demand, after the previous step."""
        if self.train_dataset is None:
            raise SimpoError("train_dataset: missing; pass the prompts to train on")
        if self._schedule.steps == 0:
            raise SimpoError(
                f"dataloader_drop_last: {len(self.train_dataset)} prompts do not fill one step of "
                f"{self._schedule.per_step}, so nothing would be trained; lower per_device_train_batch_size"
            )
        # No workers and no prefetching: answers depend on the current weights.
        steps: Any = [[step] for step in range(self._schedule.steps)]
        return DataLoader(
            _Steps(self), batch_sampler=steps, collate_fn=lambda steps: collate(steps[0]), generator=torch.Generator()
        )

    # ---- Rollouts.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in the base class; raise :class:`SimpoError` if the folder holds another run's rollouts."""
        if self.annotator is None:
            raise SimpoError("annotator: missing; pass a function that scores the answers")
        if self.processing_class is None:
            raise SimpoError("processing_class: missing; pass the tokenizer, which is needed to decode answers")
        identity = {
            "policy": policy_fingerprint(self.model, self.accelerator.mixed_precision),
            "prompts": rows_digest(self.train_dataset),
            "value": None if self._value is None else policy_fingerprint(self._value.module, "no"),
            "ptx": None if self._ptx is None else rows_digest(self._ptx.rows),
            **settings_identity(self.args),
        }
        self._files.check_identity(identity)
        return super().train(*args, **kwargs)

    @property
    def step_rows(self) -> Dataset:
        return super().step_rows if self._rollout is None else self._rollout[1]

    def row_weights(self, rows: Dataset) -> np.ndarray | None:
        """Weight each prompt by its number of answers: a policy gradient's loss is the mean over a step's answers."""
        return None if self._gradient is None else response_counts(rows)

    def micro_batches(self, data_epoch: int, step: int) -> list[PlannedBatch]:
        """Return this rank's micro-batches of a step; a rollout without a file is sampled at its first step."""
        position = self._schedule.position(data_epoch, step)
        if self._rollout is None or self._rollout[0] != position.rollout:
            self._load_rollout(position)
        assert self._rollout is not None
        rows = self._rollout[1]
        self._staleness = self.state.global_step - position.first_step
        plan, order = self._plan(rows, self.args.train_batch_size, training=False), self._schedule.order(position)
        planned = plan.step(order, position.minibatch, self.args.process_index)
        if self._gradient is not None:
            step_rows = order[position.minibatch * plan.rows_per_step :][: plan.rows_per_step]
            mean_length = response_tokens(rows)[step_rows].sum() / response_counts(rows)[step_rows].sum()
            self._denominator = mean_length if self._gradient.normalization == "tokens" else self.args.max_new_tokens
        comparisons = ComparisonRows(rows)
        return [comparisons[micro, planned.weight] for micro in planned.micro_batches]

    def _load_rollout(self, position: StepPosition) -> None:
        """Read or sample the rollout of a step and convert it into training rows."""
        assert self.annotator is not None
        records = self._files.records(position, self.annotator)
        rows = training_rows(records, self.args)
        self._rollout = position.rollout, rows
        if self._gradient is not None:
            self._kl_coef = records[0]["kl_coef"]
        if RETURNS in rows.column_names:
            values, returns = (
                torch.tensor(list(chain(*rows[name])), dtype=torch.float64) for name in (VALUES, RETURNS)
            )
            self._explained_variance = explained_variance(values, returns)

    # ---- Loss.

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Return losses, from the base class or by policy gradient, and the metrics in ``metric_names``."""
        if batch.advantages is not None:
            losses, policy = self._policy_gradient(model, batch)
            preference = losses.new_full((len(losses), len(super().metric_names)), torch.nan)
        else:
            losses, preference = super().forward_rows(model, batch)
            policy = losses.new_full((len(losses), len(_POLICY_NAMES)), torch.nan)
            if batch.rollout is not None:  # a prompt whose answers all have the same score has no pair to learn from
                paired = torch.zeros_like(losses, dtype=torch.bool).index_fill(0, batch.pairs.comparison, True)
                losses = losses.masked_fill(~paired, 0)
                preference = preference.masked_fill(~paired[:, None], torch.nan)
        rollout = losses.new_full((len(losses), len(ROLLOUT_NAMES) + 1), torch.nan)
        if batch.rollout is not None:
            rollout = torch.cat([batch.rollout, torch.full_like(batch.rollout[:, :1], self._staleness)], dim=1)
        preference[:, 0] = losses.detach()
        return losses, torch.cat([preference, policy, rollout.to(preference)], dim=1)

    def _policy_gradient(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Return each prompt's mean loss over its answers, ``[C]``, and metrics ``[C, N]``."""
        gradient, packed, args = self._gradient, batch.packed, self.args
        assert gradient is not None
        assert batch.advantages is not None
        assert batch.behavior_logps is not None
        exact = args.kl_in == "loss" and args.kl_estimator == "exact"
        outputs = token_outputs(
            model,
            packed,
            reference=self._reference.states(packed) if exact else None,
            entropy=bool(args.entropy_coef),
            value_head=None if self._value is None else self._value.head,
            path=self.path,
        )
        logp = outputs.logps
        # Before the first update, the policy is the one that sampled the answers.
        behavior = logp.detach() if self._staleness == 0 else batch.behavior_logps.to(logp)
        rollout = Rollout(logp, behavior, batch.advantages.to(logp), packed.response_of, len(packed.lengths))
        value_losses = self._value_losses(outputs, batch)
        terms = self._regularization(outputs, batch)
        if self.args.ppo is not None:
            terms = terms + self.args.ppo.value_weight * value_losses
        losses = gradient.loss(rollout, denominator=self._denominator)
        losses = losses + gradient.aggregate_tokens(terms, rollout, denominator=self._denominator)
        counts = torch.tensor([len(span.responses) for span in packed.layout.spans], device=logp.device)
        owner = torch.repeat_interleave(counts)
        with torch.no_grad():
            entropy = -logp if outputs.entropy is None else outputs.entropy
            index, columns = owner[packed.response_of], (gradient.ratios(rollout), gradient.clipped(rollout), entropy)
            metrics = [mean_by(values.to(logp), index, len(counts)) for values in columns]
            # The value function does not learn from answers without a score.
            scored = torch.ones_like(logp) if batch.returns is None else (~batch.returns.isnan()).to(logp)
            metrics.append(sum_by(value_losses * scored, index, len(counts)) / sum_by(scored, index, len(counts)))
        return mean_by(losses, owner, len(counts)), torch.stack(metrics, dim=1)

    def _regularization(self, outputs: TokenOutputs, batch: PlannedBatch) -> Tensor:
        """Return token terms ``[S]``: a KL penalty, unless it is part of the rewards, minus an entropy bonus."""
        args, terms = self.args, torch.zeros_like(outputs.logps)
        if args.kl_in == "loss" and self._kl_coef:
            kl = outputs.divergence
            if kl is None:
                assert batch.ref_token_logps is not None
                kl = kl_estimate(outputs.logps, batch.ref_token_logps.to(outputs.logps), args.kl_estimator)
            terms = terms + self._kl_coef * kl
        return terms if outputs.entropy is None else terms - args.entropy_coef * outputs.entropy

    def _value_losses(self, outputs: TokenOutputs, batch: PlannedBatch) -> Tensor:
        """Return the value function's loss per token, ``[S]``; NaN without a value function."""
        if self._value is None:
            return torch.full_like(outputs.logps, torch.nan)
        assert batch.values is not None
        assert batch.returns is not None
        values = self._value.values(batch.packed) if outputs.values is None else outputs.values
        return value_loss(values, batch.values.to(values), batch.returns.to(values), clip=self.args.ppo.value_clip)

    # ---- PPO's value function and the pretraining loss in Trainer's loop.

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as ``Trainer`` does, and add the value function's parameters."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        self._created_optimizer = self._created_optimizer or new
        if new and self._value is not None:
            self._value.add_to_optimizer(optimizer, self)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the scheduler; by now accelerate has replaced the optimizer's parameters with their shards."""
        if self._value is not None and self._shards:
            self._value.add_to_optimizer(self.optimizer, self)
        return super().create_scheduler(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Add the gradients of the pretraining loss and of the value function to the base class's step."""
        if self._value is not None:
            self._value.prepare_step()
        if self._ptx is not None:
            self._ptx.backward(model)
        loss = super().training_step(model, *args, **kwargs)
        if self._value is not None:
            norm = self._value.average_and_clip_gradients(self.accelerator, self.args.max_grad_norm)
            if not math.isfinite(norm):
                raise SimpoError(
                    f"step {self.state.global_step + 1}: the gradient of the value function is not finite, so nothing "
                    "was updated; check the scores and value_learning_rate"
                )
        return loss

    def _complete(self, staged: Path, means: dict[str, Any]) -> None:
        super()._complete(staged, means)
        if self._value is not None:
            self._value.save(staged)

    def _restore(self, checkpoint: Path) -> None:
        super()._restore(checkpoint)
        if self._value is not None:
            self._value.load(checkpoint)

    # ---- Logging and results.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as in the base class, plus the seconds spent on rollouts and on everything else since the last log."""
        if "loss" in logs:
            now = time.monotonic()
            rollouts = self._files.seconds
            logs |= {"seconds/rollouts": rollouts, "seconds/training": now - self._logged_at - rollouts}
            self._logged_at, self._files.seconds = now, 0.0
            if not math.isnan(self._explained_variance):
                logs |= {"value/explained_variance": self._explained_variance}
        super().log(logs, start_time)

    def summary(self) -> list[Metric]:
        """Return the metrics of the first and the last rollout, averaged over their prompts."""
        metrics = []
        for stage, records in self._files.ends().items():
            values = np.array(training_rows(records, self.args)[ROLLOUT][:])
            for name, column in zip(ROLLOUT_NAMES, values.T, strict=True):
                if not np.isnan(column).all():
                    metrics.append(Metric.of(name, mean_interval(column[~np.isnan(column)]), stage))
        return metrics

    def score_rows(self, dataset: Dataset) -> Scores:
        return {name: values for name, values in super().score_rows(dataset).items() if name in (*NAMES, "weight")}


class _Steps(TorchDataset):
    """The micro-batches of each step; its length is the number of prompts."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return len(self._trainer.train_dataset)

    def __getitem__(self, step: int) -> list[PlannedBatch]:
        # The trainer's step count determines the pass over the data, also after a resume.
        return self._trainer.micro_batches(self._trainer.state.global_step // self._trainer._schedule.steps, step)
