"""``OnlineTrainer``: training on answers that the model itself samples as it is trained, and an annotator scores."""

# ruff: noqa: D102 - the base class documents the methods

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from simpo.data.prompts import prepare_prompts
from simpo.data.rows import DataReport
from simpo.data.tokenizing import TOKENS, Prepared
from simpo.errors import SimpoError
from simpo.generation.engine import Engine, TransformersEngine
from simpo.generation.responses import response_texts
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.models.checkpoint import Limits
from simpo.models.devices import from_main
from simpo.objectives.policy_gradient import Rollout, kl_estimate, mean_by
from simpo.packing.model import policy_logprobs
from simpo.runs.atomic import write_text
from simpo.runs.lines import read_lines, write_lines
from simpo.runs.results import Metric, Stage
from simpo.statistics import mean_interval
from simpo.training.batches import (
    ROLLOUT,
    ComparisonRows,
    PlannedBatch,
    collate,
    describe_rows,
    response_counts,
    response_tokens,
)
from simpo.training.identity import rows_digest, settings_identity
from simpo.training.metrics import Scores
from simpo.training.online_config import OnlineConfig
from simpo.training.packed import Description
from simpo.training.preference import NAMES, PreferenceTrainer
from simpo.training.reference import policy_fingerprint
from simpo.training.rollouts import (
    CONTENT,
    ROLLOUT_NAMES,
    Annotator,
    Answered,
    Place,
    Record,
    Schedule,
    prompts_of,
    training_rows,
)
from simpo.training.sampling import sample_answers, separate_randomness

logger = logging.getLogger(__name__)

FOLDER = "rollouts"
_IDENTITY = "training.json"
_STAND_IN_TOKENS = 8
# Of a policy gradient: mean importance ratio, share of clipped tokens, and minus the mean log-probability of a token,
# which estimates the entropy.
_POLICY_NAMES = ("policy/ratio", "policy/clip_fraction", "policy/entropy")
_STALENESS = "rollout/staleness"  # optimizer steps since the answers were sampled


class OnlineTrainer(PreferenceTrainer):
    """Trains a causal language model on its own answers.

    Every ``sync_every`` steps the model answers the next prompts, ``annotator`` scores the answers, and a file in the
    folder ``rollouts`` receives them before they are trained on. A training that is continued reads the files that
    exist, so that nothing is sampled twice and it ends with the same bits. Rows to train on are prompts; held-out rows
    are pairs. Other arguments and errors are those of :class:`~simpo.training.packed.PackedTrainer`.

    Args:
        annotator: scores the answers; can also be set as an attribute before training.
        engine: samples the answers with the model as it is (default: transformers' ``generate``).
    """

    config_type = OnlineConfig  # type: ignore[assignment]
    command, row_noun = "online", "prompts"

    def __init__(
        self, *args: Any, annotator: Annotator | None = None, engine: Engine | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SimpoError("fsdp, deepspeed: sharded weights cannot sample answers; leave it out, or use simpo loop")
        self._gradient = self.args.gradient
        if self._gradient is not None:
            self._reference.keep_copy()  # for the KL divergence
            if (self.args.temperature, self.args.top_p, self.args.top_k) != (1, 1, 0):
                logger.warning(
                    "temperature, top_p, top_k: policy gradients of answers that are not drawn from the model's own "
                    "distribution (1, 1, 0) are biased"
                )
        self.annotator, self._engine = annotator, engine
        self._rollout: tuple[int, Dataset] | None = None  # the current one, by its number
        self._staleness, self._seconds = 0, 0.0
        self._logged_at = time.monotonic()
        if self.train_dataset is not None:
            self._check_room(self.train_dataset)

    def _check_room(self, rows: Dataset) -> None:
        limit, longest = Limits.of(self.model.config).positions, self.args.max_new_tokens
        long = [row for row, ids in enumerate(rows["prompt_ids"]) if limit and len(ids) + longest > limit]
        if long:
            raise SimpoError(
                f"{describe_rows(rows, long)}: the prompt and an answer of max_new_tokens {longest} do not fit the "
                f"model's {limit:,} positions; set max_length to {limit} or less"
            )

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, *_POLICY_NAMES, *ROLLOUT_NAMES, _STALENESS)

    @classmethod
    def describe(cls, args: Any) -> Description:
        how = "on-policy" if args.sync_every == 1 else f"answers sampled every {args.sync_every} steps"
        gradient = args.gradient
        if gradient is None:
            found = super().describe(args)
            return found._replace(objective=f"{found.objective}, {how}", tags=[*found.tags, "online"])
        settings = f"kl_coef {args.kl_coef:g} in the {args.kl_in}, {args.kl_estimator}"
        return Description(
            f"{args.objective} ({settings}), {how}",
            f"trained by **{args.objective}** ({gradient.paper}) on its own answers",
            ["simpo", "reinforcement-learning", args.objective],
        )

    # ---- Prompts.

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize the prompts of the rows to train on; held-out rows are pairs, as in the base.

        The prompts have stand-ins for answers, random tokens, on which the packed forward is checked.
        """
        if label != "train":
            return super().prepare(dataset, tokenizer, args, label)
        if CONTENT in dataset.column_names:
            return Prepared(dataset, DataReport(label, len(dataset), len(dataset), noun="prompts"))
        assert tokenizer is not None  # the base has checked
        room, rendering = args.max_length - args.max_new_tokens, args.tokenize_settings.rendering
        prompts = prepare_prompts(dataset, tokenizer, label=label, max_prompt_length=room, rendering=rendering)
        tokens = sorted({token for prompt in prompts for token in prompt.ids})
        size = (len(prompts), args.num_generations, _STAND_IN_TOKENS)
        answers = np.random.default_rng(0).choice(tokens, size).tolist()
        rows = [
            {
                "prompt_ids": prompt.ids,
                "response_ids": responses,
                "where": prompt.where,
                CONTENT: json.dumps(asdict(prompt)),
            }
            for prompt, responses in zip(prompts, answers, strict=True)
        ]
        kinds = {
            "prompt_ids": TOKENS,
            "response_ids": List(TOKENS),
            "where": Value("string"),
            CONTENT: Value("string"),
        }
        return Prepared(Dataset.from_list(rows, features=Features(kinds)), prompts.report)

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
        """One element per optimizer step, made when it is requested: with the weights after the step before."""
        if self.train_dataset is None:
            raise SimpoError("train_dataset: there is nothing to train on")
        if self._schedule.steps == 0:
            raise SimpoError(
                f"dataloader_drop_last: {len(self.train_dataset)} prompts are fewer than the {self._schedule.per_step} "
                "of a step, so nothing would be trained; lower per_device_train_batch_size"
            )
        # not in other processes and not in advance: answers depend on the weights
        steps = _StepSampler(self)
        return DataLoader(
            _Steps(self),
            batch_sampler=steps,
            collate_fn=lambda steps: collate(steps[0]),
            generator=torch.Generator(),
        )

    # ---- Rollouts.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base; raises :class:`SimpoError` if the folder's rollouts are of another training."""
        if self.annotator is None:
            raise SimpoError("annotator: there is nothing that scores the answers; give one")
        if self.processing_class is None:
            raise SimpoError("processing_class: give the tokenizer, which answers are decoded with")
        identity = {
            "policy": policy_fingerprint(self.model, self.accelerator.mixed_precision),
            "prompts": rows_digest(self.train_dataset),
            **settings_identity(self.args),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = self._folder / _IDENTITY
        if self.is_world_process_zero():
            known = json.loads(path.read_text())["fingerprint"] if path.exists() else None
            if known not in (None, digest) and not self.args.accept_changes:
                raise SimpoError(f"output_dir: {self._folder} is of another training; name a new folder")
            write_text(path, json.dumps({"fingerprint": digest}) + "\n")
        return super().train(*args, **kwargs)

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir) / FOLDER

    @property
    def step_rows(self) -> Dataset:
        return super().step_rows if self._rollout is None else self._rollout[1]

    def row_weights(self, rows: Dataset) -> np.ndarray | None:
        """A policy gradient's loss is the mean over the answers of a step."""
        return None if self._gradient is None else response_counts(rows)

    def micro_batches(self, data_epoch: int, step: int) -> list[PlannedBatch]:
        """This rank's micro-batches of a step; the first step of a rollout samples it, unless its file exists."""
        place = self._schedule.place(data_epoch, step)
        if self._rollout is None or self._rollout[0] != place.rollout:
            records = self._records(place)
            self._rollout = place.rollout, training_rows(records, self.args)
        rows = self._rollout[1]
        self._staleness = self.state.global_step - place.first_step
        plan = self._plan(rows, self.args.train_batch_size, training=False)
        planned = plan.step(self._schedule.order(place), place.minibatch, self.args.process_index)
        comparisons = ComparisonRows(rows)
        return [comparisons[micro, planned.weight] for micro in planned.micro_batches]

    def _records(self, place: Place) -> list[Record]:
        """The prompts of a rollout with their scored answers, from its file if there is one; all ranks call."""
        path, main = self._folder / f"{place.rollout:06}.jsonl", self.is_world_process_zero()
        known: Any = from_main(read_lines(path) if main and path.exists() else None)
        if known is not None:
            return known
        if self.state.global_step != place.first_step:
            raise SimpoError(f"{path} is missing, and the weights that its answers were sampled by are gone")
        began = time.monotonic()
        with separate_randomness(self.args.device):
            records = self._sampled(place)
        if main:
            write_lines(path, records)
        self._seconds += time.monotonic() - began
        return records

    def _sampled(self, place: Place) -> list[Record]:
        """Answer, score, and compute log-probabilities under the policy and, if there is one, the reference."""
        tokenizer = self.processing_class
        prompts = prompts_of(self.train_dataset.select(place.prompts))
        self._engine = self._engine or TransformersEngine(self.model, tokenizer)
        samples = sample_answers(self, self._engine, [one.ids for one in prompts], self._sampling(place.rollout))
        texts = response_texts(tokenizer, prompts, samples)
        answered = list(map(Answered, prompts, samples, texts))
        scores: Any = from_main(self._scores(answered, place.rollout) if self.is_world_process_zero() else None)
        ids = [[list(sampled.ids) for sampled in answers] for answers in samples]
        rows = Dataset.from_dict({"prompt_ids": [one.ids for one in prompts], "response_ids": ids})
        behavior, reference = _by_response(self.token_logps(rows), ids), [None] * len(ids)
        if self._reference.has_copy:
            with self._reference.in_place():
                reference = _by_response(self.token_logps(rows), ids)
        columns = zip(answered, ids, scores, behavior, reference, strict=True)
        return [
            {
                **{"id": one.prompt.id, "prompt": one.prompt.content, **one.prompt.context.columns},
                **{"responses": one.texts, "finished": [sampled.finished for sampled in one.samples]},
                **{"scores": own_scores, "prompt_ids": one.prompt.ids, "response_ids": own_ids},
                **{"behavior_logps": logps, "ref_logps": ref_logps, "where": one.prompt.where},
            }
            for one, own_ids, own_scores, logps, ref_logps in columns
        ]

    def token_logps(self, rows: Dataset) -> Tensor:
        """``[S]`` float64 log-probabilities of all tokens of the responses of ``rows``; all ranks call."""
        counts = response_tokens(rows)
        return self.of_responses(rows, lambda batch: policy_logprobs(self.model, batch, path=self.path), counts)

    def _sampling(self, rollout: int) -> SamplingSettings:
        settings, args = self.args.sampling, self.args
        settings = settings.resolved(context=None, chunk_size=32 if args.device.type == "cpu" else 64)
        return replace(settings, seed=derived_seed(args.seed, rollout))

    def _scores(self, answered: Sequence[Answered], rollout: int) -> list[list[float | None]]:
        """The annotator's scores; None for those that are missing or not finite.

        Raises:
            SimpoError: too many are missing, or there is not one for each answer.
        """
        assert self.annotator is not None
        given = [list(scores) for scores in self.annotator(answered)]
        if [len(scores) for scores in given] != [len(one.texts) for one in answered]:
            raise SimpoError(f"annotator: rollout {rollout}: it did not return one score for each answer")
        found = [[None if x is None or not math.isfinite(x) else float(x) for x in scores] for scores in given]
        incomplete = [number for number, scores in enumerate(found) if None in scores]
        missing, total = sum(scores.count(None) for scores in found), sum(map(len, found))
        if missing > self.args.max_missing_scores * total:
            raise SimpoError(
                f"annotator: rollout {rollout}: no score for {missing:,} of {total:,} answers, more than "
                f"max_missing_scores {self.args.max_missing_scores:g}; the first is to the prompt "
                f"{answered[incomplete[0]].prompt.where}"
            )
        return found

    # ---- Loss.

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """As in the base, or the policy gradient of a rollout, and what is logged of both; see ``metric_names``."""
        if batch.advantages is not None:
            losses, policy = self._policy_gradient(model, batch)
            own = losses.new_full((len(losses), len(super().metric_names)), torch.nan)
        else:
            losses, own = super().forward_rows(model, batch)
            policy = losses.new_full((len(losses), len(_POLICY_NAMES)), torch.nan)
            if batch.rollout is not None:  # a prompt whose answers have equal scores teaches nothing
                paired = torch.zeros_like(losses, dtype=torch.bool).index_fill(0, batch.pairs.comparison, True)
                losses, own = losses.masked_fill(~paired, 0), own.masked_fill(~paired[:, None], torch.nan)
        rollout = losses.new_full((len(losses), len(ROLLOUT_NAMES) + 1), torch.nan)
        if batch.rollout is not None:
            rollout = torch.cat([batch.rollout, torch.full_like(batch.rollout[:, :1], self._staleness)], dim=1)
        own[:, 0] = losses.detach()
        return losses, torch.cat([own, policy, rollout.to(own)], dim=1)

    def _policy_gradient(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """``[C]`` means of the losses of each prompt's answers, and ``[C, 3]`` metrics."""
        gradient, packed, args = self._gradient, batch.packed, self.args
        assert gradient is not None
        assert batch.advantages is not None
        assert batch.behavior_logps is not None
        logp = policy_logprobs(model, packed, path=self.path)
        # before the first update the policy is the one that sampled
        behavior = logp.detach() if self._staleness == 0 else batch.behavior_logps.to(logp)
        responses = len(packed.lengths)
        rollout = Rollout(logp, behavior, batch.advantages.to(logp), packed.response_of, responses)
        losses = gradient.loss(rollout, denominator=args.max_new_tokens)
        if args.kl_in == "loss" and args.kl_coef:
            assert batch.ref_token_logps is not None
            penalty = kl_estimate(logp, batch.ref_token_logps.to(logp), args.kl_estimator)
            losses = losses + args.kl_coef * gradient.add_up(penalty, rollout, denominator=args.max_new_tokens)
        counts = torch.tensor([len(span.responses) for span in packed.layout.spans], device=logp.device)
        owner = torch.repeat_interleave(counts)
        with torch.no_grad():
            ratios = gradient.ratios(rollout)
            clipped = gradient.clipped(rollout).to(logp)
            metrics = [mean_by(values, owner[packed.response_of], len(counts)) for values in (ratios, clipped, -logp)]
        return mean_by(losses, owner, len(counts)), torch.stack(metrics, dim=1)

    # ---- What is logged and compared.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the base, with the seconds spent on rollouts and on everything else since the last log."""
        if "loss" in logs:
            now = time.monotonic()
            logs |= {"seconds/rollouts": self._seconds, "seconds/training": now - self._logged_at - self._seconds}
            self._logged_at, self._seconds = now, 0.0
        super().log(logs, start_time)

    def summary(self) -> list[Metric]:
        """Means of the first and the last rollout, over their prompts."""
        found = []
        paths = sorted(self._folder.glob("0*.jsonl"))
        stages: dict[Stage, Path] = {"before": paths[0], "after": paths[-1]} if paths else {}
        for stage, path in stages.items():
            values = np.array(training_rows(read_lines(path), self.args)[ROLLOUT][:])
            for name, column in zip(ROLLOUT_NAMES, values.T, strict=True):
                if not np.isnan(column).all():
                    found.append(Metric.of(name, mean_interval(column[~np.isnan(column)]), stage))
        return found

    def score_rows(self, dataset: Dataset) -> Scores:
        return {name: values for name, values in super().score_rows(dataset).items() if name in (*NAMES, "weight")}


def _by_response(values: Tensor, ids: Sequence[Sequence[Sequence[int]]]) -> list[Any]:
    """Numbers of tokens, ``[S]``, as a list for each response of each prompt."""
    each = iter(values.cpu().split([len(one) for responses in ids for one in responses]))
    return [[next(each).tolist() for _ in responses] for responses in ids]


class _StepSampler(Sampler):
    """Yields the numbers of the steps of a pass over the data, with that of the pass."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer._schedule.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # the trainer's own step count says which pass starts, also after a resume
        epoch = self._trainer.state.global_step // len(self)
        yield from ([(epoch, step)] for step in range(len(self)))


class _Steps(TorchDataset):
    """The micro-batches of each step; its length is the number of prompts."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return len(self._trainer.train_dataset)

    def __getitem__(self, item: tuple[int, int]) -> list[PlannedBatch]:
        return self._trainer.micro_batches(*item)
