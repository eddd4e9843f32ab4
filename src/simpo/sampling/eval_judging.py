"""``eval_judge``: how a model in training compares with the start model, by a judge."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from simpo.client import agree, stand_in
from simpo.data.prompts import Prompt
from simpo.errors import SimpoError
from simpo.judges.pairwise import PairwiseApiJudge
from simpo.judges.protocol import Judge, Pair
from simpo.sampling.eval_arguments import Say
from simpo.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

_TRIED = 4  # pairs, so that one that a server refuses is not taken for all


class EvalJudge:
    """A judge of one answer to each of the same prompts, at every evaluation."""

    def __init__(self, judge: Judge, prompts: Sequence[Prompt], say: Say) -> None:
        self._judge, self._prompts, self._say = judge, prompts, say

    def agree(self, evaluations: int, longest: int, *, yes: bool) -> None:
        """Let the user agree to what a judge behind a server may cost.

        Args:
            evaluations: how often it will judge, at most.
            longest: tokens that an answer may have.
            yes: the user has agreed beforehand.

        Raises:
            SimpoError: the user does not agree, or cannot be asked.
        """
        if isinstance(self._judge, PairwiseApiJudge):
            answers = [[stand_in(longest, name)] * len(self._prompts) for name in "ab"]
            agree(
                self._judge.estimate(self._pairs(*answers)) * evaluations,
                yes=yes,
                say=lambda line: self._say(f"eval_judge, at {evaluations:,} evaluations: {line}"),
            )

    def try_on(self, answers: Sequence[str]) -> None:
        """Judge a few answers, beside themselves with something added: like ones no server would be asked about.

        Raises:
            SimpoError: they cannot be judged.
        """
        few = answers[:_TRIED]
        self._judge.compare(self._pairs(few, [f"{answer} ." for answer in few]))

    def win_rate(self, answers: Sequence[str], start: Sequence[str], step: int) -> float:
        """Mean verdict over the prompts that have one; NaN if none has, or the judge fails, which ends no training."""
        try:
            verdicts = self._judge.compare(self._pairs(answers, start))
        except SimpoError as error:
            logger.warning("step %d: no win rate: %s", step, error)
            return math.nan
        if isinstance(self._judge, PairwiseApiJudge):
            self._say(self._judge.client.usage.line())
        given = [verdict for verdict in verdicts if verdict is not None]
        if len(given) < len(verdicts):
            missing = len(verdicts) - len(given)
            logger.warning("step %d: eval_judge gave no verdict on %d of %d prompts", step, missing, len(verdicts))
        return sum(given) / len(given) if given else math.nan

    def _pairs(self, a: Sequence[str], b: Sequence[str]) -> list[Pair]:
        """Of the first prompts, as many as there are answers."""
        return [
            Pair(prompt.id, prompt.content, ours, theirs, prompt.context)
            for prompt, ours, theirs in zip(self._prompts, a, b, strict=False)
        ]


def evaluations(config: TrainingSettings, rows: int) -> int:
    """How often a training of so many rows evaluates, at most."""
    an_epoch = math.ceil(rows / (config.per_device_train_batch_size * config.world_size))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * an_epoch)
    every = an_epoch
    if config.eval_strategy == "steps":
        assert config.eval_steps is not None  # the configuration has filled it in
        every = math.ceil(config.eval_steps if config.eval_steps >= 1 else config.eval_steps * steps)
    return math.ceil(steps / every) + config.eval_on_start
