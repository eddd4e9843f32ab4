"""The rollouts of a training as files, each sampled, scored and written once, and read again after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from simpo.errors import SimpoError, third_party
from simpo.generation.engine import Engine, TransformersEngine
from simpo.generation.responses import response_texts
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.models.devices import from_main
from simpo.packing.layout import PackedBatch
from simpo.packing.model import policy_logprobs
from simpo.packing.scoring import token_outputs
from simpo.runs.atomic import remove_leftovers, write_text
from simpo.runs.lines import read_lines, write_lines
from simpo.runs.manifest import is_as_written, write_digest
from simpo.runs.results import Stage
from simpo.training.batches import response_tokens
from simpo.training.reference import ReferenceModel
from simpo.training.rollouts import Annotator, AnsweredPrompt, Place, Record, adapted_columns, prompts_from_rows
from simpo.training.sampling import preserve_rng_state, sample_answers
from simpo.training.value import ValueFunction

logger = logging.getLogger(__name__)

FOLDER = "rollouts"
_IDENTITY = "training.json"


class RolloutFiles:
    """The folder ``rollouts`` of a training.

    ``trainer`` is an :class:`~simpo.training.online.OnlineTrainer`, ``reference`` the start model, ``value`` PPO's
    value function, and ``engine`` samples the answers (default: transformers' ``generate``).
    """

    def __init__(
        self, trainer: Any, reference: ReferenceModel, value: ValueFunction | None, engine: Engine | None
    ) -> None:
        self._trainer, self._reference, self._value, self._engine = trainer, reference, value, engine
        self.seconds = 0.0  # spent on rollouts since the last log, which resets it

    @property
    def _folder(self) -> Path:
        return Path(self._trainer.args.output_dir) / FOLDER

    def ends(self) -> dict[Stage, Sequence[Record]]:
        """The first and the last rollout; without one that is missing or damaged, which is reported."""
        paths = sorted(self._folder.glob("0*.jsonl"))
        ends: dict[Stage, Path] = {"before": self._path(0), "after": paths[-1]} if paths else {}
        whole = {stage: path for stage, path in ends.items() if is_as_written(path)}
        for path in set(ends.values()) - set(whole.values()):
            logger.warning("%s is missing or damaged, and its metrics are left out of the results", path)
        return {stage: read_lines(path) for stage, path in whole.items()}

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Record what determines the rollouts; raises :class:`SimpoError` if the folder has another training's."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = self._folder / _IDENTITY
        if self._trainer.is_world_process_zero():
            remove_leftovers(self._folder)
            with third_party(f"output_dir: {path} is damaged; name a new folder"):
                known = json.loads(path.read_text())["fingerprint"] if path.exists() else None
            if known not in (None, digest) and not self._trainer.args.accept_changes:
                raise SimpoError(f"output_dir: {self._folder} belongs to another training; name a new folder")
            write_text(path, json.dumps({"fingerprint": digest}) + "\n")

    def records(self, place: Place, annotator: Annotator) -> list[Record]:
        """The prompts of a rollout with their scored answers, from its file if there is one; all ranks call."""
        trainer, path = self._trainer, self._path(place.rollout)
        known = self._read(path)
        if known is not None:
            return known
        if trainer.state.global_step != place.first_step:
            raise SimpoError(
                f"{path} is missing or damaged, and the weights that its answers were sampled by are gone; restore it, "
                "or name a new folder"
            )
        began = time.monotonic()
        previous = self._previous(place.rollout)
        with preserve_rng_state(trainer.args.device):
            records = self._sampled(place, annotator)
        if trainer.args.gradient is not None:
            columns = adapted_columns(records, previous, trainer.args)
            records = [{**record, **columns} for record in records]
        if trainer.is_world_process_zero():
            write_lines(path, records)
            write_digest(path)
        self.seconds += time.monotonic() - began
        return records

    def _path(self, rollout: int) -> Path:
        return self._folder / f"{rollout:06}.jsonl"

    def _read(self, path: Path) -> list[Record] | None:
        found: Any = None
        if self._trainer.is_world_process_zero() and is_as_written(path):
            found = read_lines(path)
        return from_main(found)

    def _previous(self, rollout: int) -> list[Record] | None:
        """The rollout before, if this one depends on it."""
        args = self._trainer.args
        if rollout == 0 or not (args.kl_target or args.normalize_scores):
            return None
        path = self._path(rollout - 1)
        found = self._read(path)
        if found is None:
            raise SimpoError(
                f"{path} is missing or damaged, which kl_target and normalize_scores continue from; copy it and its "
                "digest (.NAME.sha256) from the run whose checkpoint resume_from_checkpoint names"
            )
        return found

    def _sampled(self, place: Place, annotator: Annotator) -> list[Record]:
        """Answer, score, and compute log-probabilities under the policy and the reference, and values, if needed."""
        trainer = self._trainer
        tokenizer, prompts = trainer.processing_class, prompts_from_rows(trainer.train_dataset.select(place.prompts))
        self._engine = self._engine or TransformersEngine(trainer.model, tokenizer)
        samples = sample_answers(trainer, self._engine, [one.ids for one in prompts], self._sampling(place.rollout))
        texts = response_texts(tokenizer, prompts, samples)
        answered = list(map(AnsweredPrompt, prompts, samples, texts))
        scored: Any = None
        if trainer.is_world_process_zero():
            scored = self._scored(annotator, answered, place.rollout)
        scores, gold = from_main(scored)
        ids = [[list(sampled.ids) for sampled in answers] for answers in samples]
        rows = Dataset.from_dict({"prompt_ids": [one.ids for one in prompts], "response_ids": ids})
        logps, values = self._logps_and_values(rows)
        behavior, reference, old_values = _split_by_response(logps, ids), [None] * len(ids), [None] * len(ids)
        if self._reference.has_copy:
            with self._reference.in_place():
                reference = _split_by_response(self._logps(rows), ids)
        if values is not None:
            old_values = _split_by_response(values, ids)
        columns = zip(answered, ids, scores, behavior, reference, old_values, strict=True)
        records: list[Record] = [
            {
                **{"id": one.prompt.id, "prompt": one.prompt.content, **one.prompt.context.columns},
                **{"responses": one.texts, "finished": [sampled.finished for sampled in one.samples]},
                **{"scores": own_scores, "prompt_ids": one.prompt.ids, "response_ids": own_ids},
                **{"behavior_logps": own_logps, "ref_logps": ref_logps, "values": own_values},
                **{"where": one.prompt.where, "extra": one.prompt.extra},
            }
            for one, own_ids, own_scores, own_logps, ref_logps, own_values in columns
        ]
        if gold is None:
            return records
        return [{**record, "gold_scores": own} for record, own in zip(records, gold, strict=True)]

    def _scored(
        self, annotator: Annotator, answered: Sequence[AnsweredPrompt], rollout: int
    ) -> tuple[list[list[float | None]], list[list[float | None]] | None]:
        """The annotator's scores, and those of the gold annotator if there is one; fails like :func:`_scores`."""
        trainer = self._trainer
        scores = _scores("annotator", annotator, answered, rollout)
        _check_missing(scores, answered, rollout, trainer.args.max_missing_scores)
        if trainer.gold_annotator is None:
            return scores, None
        return scores, _scores("gold_annotator", trainer.gold_annotator, answered, rollout)

    def _sampling(self, rollout: int) -> SamplingSettings:
        args = self._trainer.args
        settings = args.sampling.resolved(context=None, chunk_size=32 if args.device.type == "cpu" else 64)
        return replace(settings, seed=derived_seed(args.seed, rollout))

    def _logps(self, rows: Dataset) -> Tensor:
        """``[S]`` float64 log-probabilities of all tokens of the responses of ``rows``."""
        trainer = self._trainer

        def compute(batch: PackedBatch) -> Tensor:
            return policy_logprobs(trainer.model, batch, path=trainer.path)

        return trainer.compute_for_responses(rows, compute, response_tokens(rows))

    def _logps_and_values(self, rows: Dataset) -> tuple[Tensor, Tensor | None]:
        """``[S]`` log-probabilities of the tokens, and the values of the states in which they are chosen."""
        trainer, value = self._trainer, self._value
        if value is None:
            return self._logps(rows), None
        value.module.eval()
        if value.head is None:
            return self._logps(rows), trainer.compute_for_responses(rows, value.of, response_tokens(rows))

        def compute(batch: PackedBatch) -> Tensor:
            found = token_outputs(trainer.model, batch, value_head=value.head, path=trainer.path)
            assert found.values is not None
            return torch.stack([found.logps, found.values], dim=1)

        logps, values = trainer.compute_for_responses(rows, compute, response_tokens(rows), columns=(2,)).unbind(1)
        return logps, values


def _scores(
    name: str, annotator: Annotator, answered: Sequence[AnsweredPrompt], rollout: int
) -> list[list[float | None]]:
    """The annotator's scores; None for those that are missing or not finite. ``name`` is that of its key, for errors.

    Raises:
        SimpoError: there is not one for each answer.
    """
    returned = [list(scores) for scores in annotator(answered)]
    if [len(scores) for scores in returned] != [len(one.texts) for one in answered]:
        raise SimpoError(f"{name}: rollout {rollout}: it did not return one score for each answer")
    return [[None if x is None or not math.isfinite(x) else float(x) for x in scores] for scores in returned]


def _check_missing(
    found: Sequence[list[float | None]], answered: Sequence[AnsweredPrompt], rollout: int, most_missing: float
) -> None:
    """Raise :class:`SimpoError` if more than the share ``most_missing`` of the scores are None."""
    incomplete = [number for number, scores in enumerate(found) if None in scores]
    missing, total = sum(scores.count(None) for scores in found), sum(map(len, found))
    if missing > most_missing * total:
        raise SimpoError(
            f"annotator: rollout {rollout}: no score for {missing:,} of {total:,} answers, more than "
            f"max_missing_scores {most_missing:g}; the first is to the prompt {answered[incomplete[0]].prompt.where}"
        )


def _split_by_response(values: Tensor, ids: Sequence[Sequence[Sequence[int]]]) -> list[Any]:
    """Numbers of tokens, ``[S]``, as a list for each response of each prompt."""
    each = iter(values.cpu().split([len(one) for responses in ids for one in responses]))
    return [[next(each).tolist() for _ in responses] for responses in ids]
