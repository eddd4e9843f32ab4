"""Rollouts: files with the answers sampled during training, and the training rows built from scored answers."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor

from simpo.data.prompts import Prompt
from simpo.data.tokenizing import TOKENS
from simpo.errors import SimpoError, third_party
from simpo.generation.engine import Engine, Sampled, TransformersEngine
from simpo.generation.responses import response_texts
from simpo.generation.settings import derived_seed
from simpo.models.devices import from_main
from simpo.models.settings import ModelArguments
from simpo.objectives.policy_gradient import advantages, kl_estimate, sum_by, whiten
from simpo.objectives.ppo import ScoreScale, adapt_kl_coefficient
from simpo.packing.layout import PackedBatch
from simpo.packing.model import policy_logprobs
from simpo.packing.scoring import token_outputs
from simpo.runs.files import read_lines, remove_leftovers, write_lines, write_text
from simpo.runs.manifest import is_intact, write_digest
from simpo.runs.results import Stage
from simpo.training.batches import (
    ADVANTAGES,
    BEHAVIOR,
    LABEL_PROBABILITY,
    REF_LOGPS,
    REF_TOKENS,
    RETURNS,
    ROLLOUT,
    VALUES,
    prompts_from_rows,
    response_tokens,
)
from simpo.training.configs import OnlineConfig
from simpo.training.reference import ReferenceModel
from simpo.training.sampling import VllmSampler, engine_gap, preserve_rng_state, sample_answers
from simpo.training.value import ValueFunction

logger = logging.getLogger(__name__)

FOLDER = "rollouts"
_IDENTITY = "training.json"
Record = Mapping[str, Any]  # a prompt with its scored answers: one line of a rollout file
Scores = list[float | None]  # one per answer to a prompt; None if missing
# Metrics of the answers to a prompt, in the column ROLLOUT: mean score, estimated KL(policy || start) per answer,
# mean length in tokens, share that ended on their own, share of duplicates, share without a score, whether all scores
# are equal (the prompt then gives no signal, except to a policy gradient with a value function), share of scores
# changed by score_clip, the rollout's KL coefficient, mean score from the gold annotator, and the difference from
# vLLM's log-probabilities, in nats per token.
_PARTS = (
    "reward", "kl", "length", "ended", "identical", "missing_scores", "equal_scores", "clipped_scores", "kl_coef",
    "gold", "engine_gap",
)  # fmt: skip
ROLLOUT_NAMES = tuple(f"rollout/{name}" for name in _PARTS)


class AnsweredPrompt(NamedTuple):
    """A prompt and its answers, as passed to an annotator."""

    prompt: Prompt
    samples: list[Sampled]
    texts: list[str]


# Returns the scores of all answers to each prompt, higher is better; None where no score is possible.
Annotator = Callable[[Sequence[AnsweredPrompt]], Sequence[Sequence[float | None]]]


class StepPosition(NamedTuple):
    """Where a step belongs: its rollout, that rollout's first step and prompts, the pass over them, the minibatch."""

    rollout: int
    first_step: int
    prompts: np.ndarray
    epoch: int
    minibatch: int


@dataclass(frozen=True)
class Schedule:
    """Assigns prompts to rollouts and optimizer steps."""

    prompts: int  # number of prompts
    per_step: int  # prompts per step over all ranks; the last step of an epoch may have fewer
    sync_every: int  # steps per rollout; the last rollout of an epoch may have fewer
    rollout_epochs: int  # passes over the prompts of a rollout
    seed: int | None  # shuffles the prompts, differently in every epoch; None keeps their order
    drop_last: bool  # drop an incomplete last step

    @property
    def minibatches(self) -> int:
        """Number of steps that use every prompt of the data once."""
        full, rest = divmod(self.prompts, self.per_step)
        return full + (rest > 0 and not self.drop_last)

    @property
    def steps(self) -> int:
        """Number of optimizer steps in an epoch of the data."""
        return self.minibatches * self.rollout_epochs

    def position(self, data_epoch: int, step: int) -> StepPosition:
        """Return where ``step`` of epoch ``data_epoch`` belongs."""
        block, within = divmod(step, self.sync_every)
        size = self.sync_every // self.rollout_epochs  # minibatches per rollout
        epoch, minibatch = divmod(within, min(size, self.minibatches - block * size))
        rollout = data_epoch * math.ceil(self.steps / self.sync_every) + block
        first_step = data_epoch * self.steps + block * self.sync_every
        order = np.arange(self.prompts)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, data_epoch)).permutation(self.prompts)
        order = order[: self.minibatches * self.per_step]
        chosen = order[block * size * self.per_step : (block + 1) * size * self.per_step]
        return StepPosition(rollout, first_step, chosen, epoch, minibatch)

    def order(self, position: StepPosition) -> np.ndarray:
        """Return the order of a rollout's prompts in this pass; the first pass keeps it, later ones shuffle."""
        if position.epoch == 0 or self.seed is None:
            return np.arange(len(position.prompts))
        return np.random.default_rng((self.seed, position.rollout, position.epoch)).permutation(len(position.prompts))


# ---- Rollout files.


class RolloutFiles:
    """The ``rollouts`` folder of a run: each rollout is sampled, scored and written once, and read again on resume.

    ``trainer`` is an :class:`~simpo.training.online.OnlineTrainer`, ``reference`` the initial model, ``value`` PPO's
    value function, ``engine`` samples answers (default: the recipe's), and ``loading`` is how the model was loaded.
    """

    def __init__(
        self,
        trainer: Any,
        reference: ReferenceModel,
        value: ValueFunction | None,
        engine: Engine | None,
        loading: ModelArguments | None,
    ) -> None:
        self._trainer, self._reference, self._value, self._engine = trainer, reference, value, engine
        self._folder = Path(trainer.args.output_dir) / FOLDER
        self._vllm: VllmSampler | None = None
        if engine is None and trainer.args.engine == "vllm":
            self._vllm = VllmSampler(trainer, loading, self._folder / "weights")
        self.seconds = 0.0  # spent on rollouts since the last log; logging resets it

    def _path(self, rollout: int) -> Path:
        return self._folder / f"{rollout:06}.jsonl"

    def ends(self) -> dict[Stage, Sequence[Record]]:
        """Return the first and the last rollout; warn about and leave out one that is missing or damaged."""
        paths = sorted(self._folder.glob("0*.jsonl"))
        ends: dict[Stage, Path] = {"before": self._path(0), "after": paths[-1]} if paths else {}
        intact = {stage: path for stage, path in ends.items() if is_intact(path)}
        for path in set(ends.values()) - set(intact.values()):
            logger.warning("%s is missing or damaged; its metrics are left out of the results", path)
        return {stage: read_lines(path) for stage, path in intact.items()}

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Record what determines the rollouts; raise :class:`SimpoError` if the folder holds another run's."""
        if not self._trainer.is_world_process_zero():
            return
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = self._folder / _IDENTITY
        remove_leftovers(self._folder)
        with third_party(f"output_dir: {path} is damaged; name a new folder"):
            stored = json.loads(path.read_text())["fingerprint"] if path.exists() else None
        if stored not in (None, digest) and not self._trainer.args.accept_changes:
            raise SimpoError(f"output_dir: {self._folder} holds the rollouts of another run; name a new folder")
        write_text(path, json.dumps({"fingerprint": digest}) + "\n")

    def records(self, position: StepPosition, annotator: Annotator) -> list[Record]:
        """Return a rollout's prompts with scored answers, from its file or newly sampled. Every rank must call this."""
        trainer, path = self._trainer, self._path(position.rollout)
        args = trainer.args
        stored = self._read(path)
        if stored is not None:
            return stored
        if trainer.state.global_step != position.first_step:
            raise SimpoError(
                f"{path} is missing or damaged, and the weights that sampled its answers no longer exist; restore the "
                "file, or start over in a new folder"
            )
        began, previous = time.monotonic(), None
        if position.rollout > 0 and (args.kl_target or args.normalize_scores):
            before = self._path(position.rollout - 1)
            previous = self._read(before)
            if previous is None:
                raise SimpoError(
                    f"{before} is missing or damaged, but kl_target and normalize_scores depend on it; copy it and its "
                    "digest (.NAME.sha256) from the run that saved the checkpoint in resume_from_checkpoint"
                )
        with preserve_rng_state(args.device):
            records = self._sample_records(position, annotator)
        if args.gradient is not None:
            columns = adapted_columns(records, previous, args)
            records = [{**record, **columns} for record in records]
        if trainer.is_world_process_zero():
            write_lines(path, records)
            write_digest(path)
        self.seconds += time.monotonic() - began
        return records

    def _read(self, path: Path) -> list[Record] | None:
        main = self._trainer.is_world_process_zero()
        records: Any = read_lines(path) if main and is_intact(path) else None
        return from_main(records)

    def _sample_records(self, position: StepPosition, annotator: Annotator) -> list[Record]:
        """Sample and score answers; compute policy log-probabilities and, if needed, reference ones and values."""
        trainer = self._trainer
        tokenizer, prompts = trainer.processing_class, prompts_from_rows(trainer.train_dataset.select(position.prompts))
        samples, logps, old_values = self._answers([prompt.ids for prompt in prompts], position.rollout)
        ids = [[list(sampled.ids) for sampled in answers] for answers in samples]
        answered = list(map(AnsweredPrompt, prompts, samples, response_texts(tokenizer, prompts, samples)))
        scores: Any = {}
        if trainer.is_world_process_zero():
            scores["scores"] = self._scores("annotator", annotator, answered, position.rollout)
            if trainer.gold_annotator is not None:
                scores["gold_scores"] = self._scores(
                    "gold_annotator", trainer.gold_annotator, answered, position.rollout
                )
        scores = from_main(scores)
        ref_logps: list[Any] = [None] * len(ids)
        if self._reference.has_copy:
            with self._reference.in_place():
                rows = Dataset.from_dict({"prompt_ids": [prompt.ids for prompt in prompts], "response_ids": ids})
                ref_logps = _by_response(self._logps(rows), ids)
        return [
            {
                "id": one.prompt.id, "prompt": one.prompt.content, **one.prompt.context.columns,
                "responses": one.texts, "finished": [sampled.finished for sampled in one.samples],
                "scores": scores["scores"][row], "prompt_ids": one.prompt.ids, "response_ids": ids[row],
                "behavior_logps": logps[row], "ref_logps": ref_logps[row], "values": old_values[row],
                "where": one.prompt.where, "extra": one.prompt.extra,
                **({"gold_scores": scores["gold_scores"][row]} if "gold_scores" in scores else {}),
                **({} if self._vllm is None else {"engine_logps": [sampled.logp for sampled in one.samples]}),
            }
            for row, one in enumerate(answered)
        ]  # fmt: skip

    def _answers(self, prompts: Sequence[list[int]], rollout: int) -> tuple[list[list[Sampled]], list[Any], list[Any]]:
        """Sample answers to tokenized prompts; return them with their token log-probabilities and values."""
        samples = self._samples(prompts, rollout)
        ids = [[list(sampled.ids) for sampled in answers] for answers in samples]
        behavior, values = self._logps_and_values(Dataset.from_dict({"prompt_ids": prompts, "response_ids": ids}))
        logps = _by_response(behavior, ids)
        if self._vllm is not None and not self._vllm.accepts(samples, logps):
            return self._answers(prompts, rollout)  # with a restarted engine
        return samples, logps, [None] * len(ids) if values is None else _by_response(values, ids)

    def _samples(self, prompts: Sequence[list[int]], rollout: int) -> list[list[Sampled]]:
        trainer = self._trainer
        chunk_size = 1024 if self._vllm is not None else 32 if trainer.args.device.type == "cpu" else 64
        settings = trainer.args.sampling.resolved(context=None, chunk_size=chunk_size)
        settings = replace(settings, seed=derived_seed(trainer.args.seed, rollout))
        if self._vllm is not None:
            return self._vllm.sample(prompts, settings)
        self._engine = self._engine or TransformersEngine(trainer.model, trainer.processing_class)
        return sample_answers(trainer, self._engine, prompts, settings)

    def _scores(
        self, name: str, annotator: Annotator, answered: Sequence[AnsweredPrompt], rollout: int
    ) -> list[Scores]:
        """Return the scores from the annotator called ``name``, with None for those that are missing or not finite.

        Raises:
            SimpoError: the number of scores is wrong, or the annotator leaves out more than ``max_missing_scores``.
        """
        returned = [list(scores) for scores in annotator(answered)]
        if [len(scores) for scores in returned] != [len(one.texts) for one in answered]:
            raise SimpoError(f"{name}: rollout {rollout}: it must return exactly one score for each answer")
        cleaned = [[None if x is None or not math.isfinite(x) else float(x) for x in scores] for scores in returned]
        allowed = self._trainer.args.max_missing_scores
        missing, total = sum(scores.count(None) for scores in cleaned), sum(map(len, cleaned))
        if name == "annotator" and missing > allowed * total:
            first = next(one for one, scores in zip(answered, cleaned, strict=True) if None in scores)
            raise SimpoError(
                f"annotator: rollout {rollout}: no score for {missing:,} of {total:,} answers, more than "
                f"max_missing_scores {allowed:g} permits; the first one answers the prompt at {first.prompt.where}"
            )
        return cleaned

    def _logps(self, rows: Dataset) -> Tensor:
        """Return the log-probabilities of all response tokens in ``rows``, ``[S]`` float64."""
        compute = partial(policy_logprobs, self._trainer.model, path=self._trainer.path)
        return self._trainer.compute_for_responses(rows, compute, response_tokens(rows))

    def _logps_and_values(self, rows: Dataset) -> tuple[Tensor, Tensor | None]:
        """Return token log-probabilities ``[S]`` and, for PPO, the values ``[S]`` of the states they were chosen in."""
        trainer, value = self._trainer, self._value
        if value is None:
            return self._logps(rows), None
        value.module.eval()
        if value.head is None:
            return self._logps(rows), trainer.compute_for_responses(rows, value.values, response_tokens(rows))

        def compute(batch: PackedBatch) -> Tensor:
            outputs = token_outputs(trainer.model, batch, value_head=value.head, path=trainer.path)
            assert outputs.values is not None
            return torch.stack([outputs.logps, outputs.values], dim=1)

        logps, values = trainer.compute_for_responses(rows, compute, response_tokens(rows), columns=(2,)).unbind(1)
        return logps, values


def _by_response(values: Tensor, ids: Sequence[Sequence[Sequence[int]]]) -> list[Any]:
    """Split token values ``[S]`` into one list per response of each prompt."""
    each = iter(values.cpu().split([len(response) for responses in ids for response in responses]))
    return [[next(each).tolist() for _ in responses] for responses in ids]


# ---- From scored answers to training rows.


def final_scores(record: Record, unfinished_score: float | None) -> list[float | None]:
    """Return the scores of a prompt's answers, replaced by ``unfinished_score`` where an answer was cut off."""
    columns = zip(record["scores"], record["finished"], strict=True)
    return [score if finished or unfinished_score is None else unfinished_score for score, finished in columns]


def adapted_columns(
    records: Sequence[Record], previous: Sequence[Record] | None, args: OnlineConfig
) -> dict[str, float]:
    """Return the columns of a policy-gradient rollout that depend on earlier rollouts; all its records share them.

    These are the KL coefficient and the mean and standard deviation of the initial model's scores. ``records`` is the
    rollout without these columns, and ``previous`` is the rollout before it, if any.
    """
    if previous is not None:
        coefficient = previous[0]["kl_coef"]
        if args.kl_target is not None:
            answers = sum(len(record["response_ids"]) for record in previous)
            measured = sum(map(_divergence, previous)) / answers
            assert args.kl_horizon is not None
            coefficient = adapt_kl_coefficient(
                coefficient, measured, answers, target=args.kl_target, horizon=args.kl_horizon
            )
        return {"kl_coef": coefficient, **{key: previous[0][key] for key in ("score_mean", "score_std")}}
    scale = ScoreScale()
    if args.normalize_scores:
        scores = [score for record in records for score in final_scores(record, args.unfinished_score)]
        known = [score for score in scores if score is not None]
        try:
            scale = ScoreScale.of(torch.tensor(known or [0.0], dtype=torch.float64))
        except ValueError as error:
            raise SimpoError(f"normalize_scores: rollout 0: {error}; leave it out") from error
    assert args.kl_coef is not None
    return {"kl_coef": args.kl_coef, "score_mean": scale.mean, "score_std": scale.std}


def training_rows(records: Sequence[Record], args: OnlineConfig) -> Dataset:
    """Build training rows from a rollout: each prompt becomes one row with the answers to train on.

    A policy gradient trains on all answers, with an advantage for every token; it is 0 if the answer has no score or
    the prompt has too few scores for the baseline. A preference objective trains on the answers it compares, best
    first, with their scores; a prompt without two different scores gets equal ones and thus forms no pair.
    """
    scores = [final_scores(record, args.unfinished_score) for record in records]
    columns: dict[str, list[Any]] = {name: [record[name] for record in records] for name in ("prompt_ids", "where")}
    columns[ROLLOUT] = [_metrics(record, given, args) for record, given in zip(records, scores, strict=True)]
    if args.gradient is not None:
        columns["response_ids"] = [record["response_ids"] for record in records]
        columns |= _token_columns(records, scores, args)
    else:
        compared = [_select_compared(given, args.pairs) for given in scores]
        answers = [(record, chosen) for record, (chosen, _) in zip(records, compared, strict=True)]
        columns["response_ids"] = [[record["response_ids"][k] for k in chosen] for record, chosen in answers]
        columns["scores"] = [ranked for _, ranked in compared]
        if args.soft_labels:
            columns[LABEL_PROBABILITY] = [1 / (1 + math.exp(worse - better)) for better, worse in columns["scores"]]
        if records[0]["ref_logps"] is not None:
            columns[REF_LOGPS] = [[sum(record["ref_logps"][k]) for k in chosen] for record, chosen in answers]
    types: dict[str, Any] = dict.fromkeys(columns, List(Value("float64")))
    types |= {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "where": Value("string")}
    if args.soft_labels:
        types[LABEL_PROBABILITY] = Value("float64")
    return Dataset.from_dict(columns, features=Features(types))


def _divergence(record: Record) -> float:
    """Return the estimated KL(policy || initial model), summed over a prompt's answers."""
    return sum(map(sum, record["behavior_logps"])) - sum(map(sum, record["ref_logps"]))


def _scaled(record: Record, scores: Sequence[float | None], clip: float | None) -> list[float | None]:
    scale = ScoreScale(record["score_mean"], record["score_std"])
    return [None if score is None else scale.apply(score, clip) for score in scores]


def _metrics(record: Record, scores: Sequence[float | None], args: OnlineConfig) -> list[float]:
    """Return the values of :data:`ROLLOUT_NAMES`; NaN for those that do not apply."""
    ids, known = record["response_ids"], [score for score in scores if score is not None]
    gold = [score for score in record.get("gold_scores", ()) if score is not None]
    clipped = coefficient = math.nan
    if args.gradient is not None:
        coefficient = record["kl_coef"]
        pairs = zip(_scaled(record, known, args.score_clip), _scaled(record, known, None), strict=True)
        clipped = sum(one != other for one, other in pairs) / len(known) if known else math.nan
    return [
        sum(known) / len(known) if known else math.nan,
        math.nan if record["ref_logps"] is None else _divergence(record) / len(ids),
        sum(map(len, ids)) / len(ids),
        sum(record["finished"]) / len(ids),
        1 - len(set(map(tuple, ids))) / len(ids),
        record["scores"].count(None) / len(ids),
        float(len(set(known)) < 2),
        clipped,
        coefficient,
        sum(gold) / len(gold) if gold else math.nan,
        engine_gap([record["behavior_logps"]], [record["engine_logps"]]) if "engine_logps" in record else math.nan,
    ]


def _select_compared(scores: Sequence[float | None], pairs: str) -> tuple[list[int], list[float]]:
    """Return the indices of the answers to compare, best first, and their scores."""
    order = sorted((k for k, score in enumerate(scores) if score is not None), key=lambda k: -scores[k])  # type: ignore[operator]
    if len(order) < 2:
        return [0, 1], [0.0, 0.0]
    chosen = [order[0], order[-1]] if pairs == "best_worst" else order
    return chosen, [scores[k] for k in chosen]  # type: ignore[misc]


def _token_columns(
    records: Sequence[Record], scores: Sequence[Scores], args: OnlineConfig
) -> dict[str, list[list[float]]]:
    """Return a policy gradient's columns by name, each with one number per token of a prompt's answers."""
    gradient, ppo = args.gradient, args.ppo
    assert gradient is not None
    sources = {BEHAVIOR: "behavior_logps", REF_TOKENS: "ref_logps"} | ({} if ppo is None else {VALUES: "values"})
    columns = {name: [list(chain(*record[source])) for record in records] for name, source in sources.items()}
    tokens = {name: _doubles(list(chain(*column))) for name, column in columns.items()}  # [S] each
    lengths = [len(ids) for record in records for ids in record["response_ids"]]
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # [S]
    group = torch.arange(len(records)).repeat_interleave(torch.tensor(list(map(len, scores))))  # [R]
    rewards = list(chain(*(_scaled(*both, args.score_clip) for both in zip(records, scores, strict=True))))
    known = torch.tensor([reward is not None for reward in rewards])
    reward = _doubles([value or 0.0 for value in rewards])  # [R]
    penalty = torch.zeros(len(segment), dtype=torch.float64)
    if args.kl_in == "reward":
        assert args.kl_estimator is not None
        penalty = records[0]["kl_coef"] * kl_estimate(tokens[BEHAVIOR], tokens[REF_TOKENS], args.kl_estimator)
    if gradient.baseline in ("leave_one_out", "group"):  # a prompt's only score would be its own baseline
        known &= torch.bincount(group[known], minlength=len(records))[group] > 1
    of_known = known[segment]
    advantage, returns = torch.zeros_like(penalty), torch.full_like(penalty, torch.nan)
    if known.any():
        numbers, segments = segment[of_known].unique_consecutive(return_inverse=True)
        if ppo is not None:
            values = tokens[VALUES][of_known]
            estimates, returns[of_known] = ppo.estimate(reward[known], penalty[of_known], values, segments)
            estimates = whiten(estimates) if args.whiten_advantages else estimates
        else:
            per_answer = reward[known] - sum_by(penalty[of_known], segments, len(numbers))
            groups = group[known].unique_consecutive(return_inverse=True)[1]
            per_answer = advantages(per_answer, groups, gradient.baseline, scale_by_std=gradient.scale_by_std)
            estimates = (whiten(per_answer) if args.whiten_advantages else per_answer)[segments]
        advantage[of_known] = estimates
    sizes = list(map(len, columns[BEHAVIOR]))
    for name, column in {ADVANTAGES: advantage, **({} if ppo is None else {RETURNS: returns})}.items():
        columns[name] = [part.tolist() for part in column.split(sizes)]
    return columns


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
