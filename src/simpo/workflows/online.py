"""``simpo online``: the annotator of a training on the model's own answers, as a part of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import Trainer

from simpo.client import confirm_cost, placeholder_answer
from simpo.judging.protocol import Answers, Scorer, Scores
from simpo.judging.registry import count_missing, make_annotator
from simpo.judging.settings import AnnotatorArguments, JudgeOptions
from simpo.models.settings import ModelArguments
from simpo.runs.log import Log
from simpo.training.batches import prompts_from_rows
from simpo.training.callbacks import RunCallback
from simpo.training.configs import OnlineConfig
from simpo.training.rollouts import AnsweredPrompt

_TRIED_PROMPTS = 2


class Annotation(RunCallback):
    """Scores a trainer's rollouts with any annotator of ``simpo annotate``; the main process does it for all."""

    _scorer: Scorer
    _gold: Scorer | None
    _config: OnlineConfig
    _log: Log

    def __init__(self, arguments: AnnotatorArguments, model: ModelArguments) -> None:
        self._arguments, self._model = arguments, model

    @property
    def settings(self) -> Mapping[str, Any]:
        """The annotators' names, and what determines their scores."""
        found = {"annotator": self._arguments.annotator}
        found |= {f"annotator/{key}": value for key, value in self._scorer.identity.items()}
        if self._gold is not None:
            found |= {f"gold_annotator/{key}": value for key, value in self._gold.identity.items()}
        return found

    def prepare(self, config: OnlineConfig, processing: Any, held_out: Dataset | None, log: Log) -> None:
        """Make the annotators and load what they need; raises :class:`~simpo.errors.SimpoError` if that fails."""
        arguments = self._arguments
        client = arguments.client()
        if client is not None:
            client.endpoint.api_key()
        # an annotator's own progress would start again with every rollout
        options = JudgeOptions.during_training(self._model, client, lambda line: None)
        self._scorer = make_annotator(arguments.annotator, options, arguments.annotator_normalization)
        self._gold = None if arguments.gold_annotator is None else make_annotator(arguments.gold_annotator, options)
        self._config, self._log = config, log
        if config.process_index == 0:
            for scorer in self._scorers:
                scorer.prepare()

    @property
    def _scorers(self) -> list[Scorer]:
        """Every annotator on its own."""
        return [*self._scorer.scorers, *([] if self._gold is None else [self._gold])]

    def check_trainer(self, trainer: Trainer) -> None:
        """Try the annotators on invented answers, except behind a server, whose cost is confirmed instead."""
        trainer.annotator = self.score
        if self._gold is not None:
            trainer.gold_annotator = self.score_by_gold
        if self._config.process_index:
            return
        number = self._config.num_generations
        prompts = prompts_from_rows(trainer.train_dataset)
        invented = [Answers.to(one, ["Answer."] * number) for one in prompts]
        for scorer in self._scorers:
            scorer.check(invented)
            if scorer.usage is None:
                scorer.score(invented[:_TRIED_PROMPTS])
        if self._scorer.usage is None:
            return
        assert self._config.max_new_tokens is not None
        longest = [placeholder_answer(self._config.max_new_tokens, f"a{k}") for k in range(number)]
        estimate = self._scorer.estimate([Answers.to(one, longest) for one in prompts])
        passes = math.ceil(self._config.num_train_epochs)
        if self._config.max_steps > 0:
            per_step = self._config.train_batch_size * self._config.world_size / self._config.rollout_epochs
            passes = math.ceil(self._config.max_steps * per_step / len(prompts))
        confirm_cost(estimate * passes, yes=self._arguments.annotator_yes, log=self._log)

    def score(self, answered: Sequence[AnsweredPrompt]) -> Scores:
        """The scores of a rollout's answers; what one of several annotators leaves without a score is logged."""
        rows = _rows(answered)
        scores = self._scorer.score(rows)
        for name, count in count_missing(self._scorer.parts).items():
            if count:
                self._log(f"{name}: no score for {count:,} of {sum(len(row.responses) for row in rows):,} answers")
        return scores

    def score_by_gold(self, answered: Sequence[AnsweredPrompt]) -> Scores:
        """The scores of a rollout's answers by the annotator that is not trained on."""
        assert self._gold is not None
        return self._gold.score(_rows(answered))


def _rows(answered: Sequence[AnsweredPrompt]) -> list[Answers]:
    return [Answers.to(one.prompt, one.texts) for one in answered]
