"""Judges and scorers by the names that the command line gives them, and several annotators as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from simpo.client import Estimate, Usage
from simpo.config.fields import nearest
from simpo.errors import SimpoError
from simpo.judging.pairwise import PairwiseApiJudge
from simpo.judging.protocol import Answers, Judge, Scorer, Scores
from simpo.judging.scorers import (
    ExactScorer,
    FunctionScorer,
    HumanJudge,
    IFBenchScorer,
    ModelScorer,
    ReasoningGymScorer,
)
from simpo.judging.settings import ANNOTATORS, JUDGES, Annotator, JudgeOptions, Normalization, annotator_names
from simpo.models.settings import ModelArguments

# ---- Several annotators as one.


def normalize(scores: Sequence[float], how: Normalization) -> list[float]:
    """The scores of one prompt's answers on a scale that different annotators share.

    Args:
        scores: one finite score per answer.
        how: ``none`` leaves them; ``zscore`` subtracts their mean and divides by their standard deviation (``n - 1``),
            as GRPO does with each of several rewards in GDPO (Liu et al. 2026, arXiv 2601.05242); ``rank`` is the share
            of the other answers that an answer is better than, ties counted half, which is Borda's count.

    Returns:
        One number per answer; where scores do not differ, 0 by ``zscore`` and 0.5 by ``rank``.
    """
    if how == "none":
        return list(scores)
    others = len(scores) - 1
    if how == "zscore":
        mean, deviation = fmean(scores), stdev(scores) if others else 0.0
        return [(score - mean) / deviation if deviation else 0.0 for score in scores]
    if not others:
        return [0.5]
    return [(sum(two < one for two in scores) + (sum(two == one for two in scores) - 1) / 2) / others for one in scores]


class CombinedScorer(Scorer):
    """Scores an answer with the weighted sum of several scorers' normalized scores.

    An answer that one of the scorers leaves without a score has none, and the other answers to the prompt are
    normalized as if it were not there.
    """

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float], how: Normalization) -> None:
        """Combine ``scorers`` with ``weights``, both by scorer; for ``how``, see :func:`normalize`."""
        self._scorers, self._weights, self._how = scorers, weights, how

    @property
    def scorers(self) -> list[Scorer]:
        """The scorers, each on its own."""
        return list(self._scorers.values())

    @property
    def identity(self) -> dict[str, Any]:
        """The normalization, and every scorer's weight and identity."""
        found = {"judge": "combined", "normalization": self._how}
        for name, scorer in self._scorers.items():
            found |= {
                f"{name}/{key}": value for key, value in ({"weight": self._weights[name]} | scorer.identity).items()
            }
        return found

    @property
    def usage(self) -> Usage | None:
        """The requests of the scorer that uses a server, of which there is at most one; None if there is none."""
        return next((scorer.usage for scorer in self.scorers if scorer.usage is not None), None)

    def prepare(self) -> None:
        """Prepare all scorers."""
        for scorer in self.scorers:
            scorer.prepare()

    def check(self, rows: Sequence[Answers]) -> None:
        """Check the rows for all scorers."""
        for scorer in self.scorers:
            scorer.check(rows)

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """The requests of all scorers."""
        return sum((scorer.estimate(rows) for scorer in self.scorers), Estimate())

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """The combined scores; a score that is not finite counts as missing."""
        self.parts = {name: scorer.score(rows) for name, scorer in self._scorers.items()}
        weights = [self._weights[name] for name in self.parts]
        by_prompt = zip(*self.parts.values(), strict=True)
        return [self._combine_answers(list(zip(*own, strict=True)), weights) for own in by_prompt]

    def _combine_answers(
        self, answers: Sequence[Sequence[float | None]], weights: Sequence[float]
    ) -> list[float | None]:
        """The combined scores of one prompt; ``answers`` has, for each answer, its scores by all scorers."""
        complete = [k for k, scores in enumerate(answers) if all(x is not None and math.isfinite(x) for x in scores)]
        combined: list[float | None] = [None] * len(answers)
        if complete:
            columns = [normalize(column, self._how) for column in zip(*(answers[k] for k in complete), strict=True)]  # type: ignore[arg-type]
            for k, scores in zip(complete, zip(*columns, strict=True), strict=True):
                # fsum rounds once, so that the order of the annotators has no effect
                combined[k] = math.fsum(weight * score for weight, score in zip(weights, scores, strict=True))
        return combined


def count_missing(each: Mapping[str, Scores]) -> dict[str, int]:
    """How many answers each scorer left without a score, by the scorer's name."""
    return {
        name: sum(x is None or not math.isfinite(x) for row in scores for x in row) for name, scores in each.items()
    }


def make_judge(name: str, options: JudgeOptions) -> Judge:
    """The judge with this name: every scorer, or the verdicts of people."""
    kind, _, rest = name.partition(":")
    if kind == "human" and rest:
        return HumanJudge(Path(rest).expanduser())
    return make_scorer(name, options, known=JUDGES)


def check_judges_anew(name: str) -> None:
    """Reject a judge whose verdicts belong to one fixed set of answers, where every run has new answers."""
    if name.partition(":")[0] == "human":
        raise SimpoError(
            f"{name}: its verdicts belong to other answers; new answers can be judged by one of {ANNOTATORS}"
        )


def make_annotator(annotator: Annotator, options: JudgeOptions, normalization: Normalization | None = None) -> Scorer:
    """The scorer that an ``annotator`` key names.

    ``annotator`` is the name of a scorer, or the weights of several by their names, whose scores are normalized by
    ``normalization``, ``zscore`` if None.
    """
    names = annotator_names(annotator, normalization)
    if isinstance(annotator, str):
        return make_scorer(annotator, options)
    scorers = {name: make_scorer(name, options) for name in names}
    return CombinedScorer(scorers, annotator, normalization or "zscore")


def make_scorer(name: str, options: JudgeOptions, *, known: str = ANNOTATORS) -> Scorer:
    """The scorer with this name; ``known`` are the names that an error message lists."""
    kind, _, rest = name.partition(":")
    if name == "api":
        if options.client is None:
            raise SimpoError("judge api: name the server and the model with --judge_url and --judge_model")
        return PairwiseApiJudge(options.client, prompt=options.prompt, max_tokens=options.max_tokens, log=options.log)
    if name == "exact":
        return ExactScorer()
    if name == "ifbench":
        return IFBenchScorer()
    if kind == "reasoning_gym" and rest:
        return ReasoningGymScorer(rest)
    if kind == "function" and rest:
        return FunctionScorer(rest, trust_remote_code=options.trust_remote_code)
    if kind in ("reward", "logp") and rest:
        model = ModelArguments(
            rest,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            allow_pickle=options.allow_pickle,
        )
        return ModelScorer(kind, model, options.log)
    raise SimpoError(f"judge {name!r} is not known{nearest(name, known.split(', '))}; the judges are {known}")
