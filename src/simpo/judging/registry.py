"""Creates judges and scorers by name, and combines several annotators into one."""

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

# ---- Combining annotators.


def normalize(scores: Sequence[float], how: Normalization) -> list[float]:
    """Put the scores of one prompt's answers on a scale that is comparable across annotators.

    Args:
        scores: one finite score per answer.
        how: ``none`` returns them unchanged. ``zscore`` subtracts their mean and divides by their standard deviation
            (``n - 1``), as GDPO does with each of several rewards (Liu et al. 2026, arXiv 2601.05242). ``rank`` is the
            fraction of the other answers that an answer beats, ties counting half (the normalized Borda count).

    Returns:
        One number per answer; if all scores are equal, 0 for ``zscore`` and 0.5 for ``rank``.
    """
    if how == "none":
        return list(scores)
    others = len(scores) - 1
    if how == "zscore":
        mean, deviation = fmean(scores), stdev(scores) if others else 0.0
        return [(score - mean) / deviation if deviation else 0.0 for score in scores]
    if not others:
        return [0.5]
    return [(sum(x < score for x in scores) + (sum(x == score for x in scores) - 1) / 2) / others for score in scores]


class CombinedScorer(Scorer):
    """Scores an answer by the weighted sum of several scorers' normalized scores.

    An answer that any of the scorers could not score gets no score and is left out when the prompt's other answers are
    normalized.
    """

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float], how: Normalization) -> None:
        """Combine ``scorers`` with ``weights``, both keyed by name; for ``how``, see :func:`normalize`."""
        self._scorers, self._weights, self._how = scorers, weights, how

    @property
    def scorers(self) -> list[Scorer]:
        """The individual scorers."""
        return list(self._scorers.values())

    @property
    def identity(self) -> dict[str, Any]:
        """The normalization, and every scorer's weight and identity."""
        identity = {"judge": "combined", "normalization": self._how}
        for name, scorer in self._scorers.items():
            identity |= {
                f"{name}/{key}": value for key, value in ({"weight": self._weights[name]} | scorer.identity).items()
            }
        return identity

    @property
    def usage(self) -> Usage | None:
        """The totals of the scorer that uses a server (there is at most one), or None."""
        return next((scorer.usage for scorer in self.scorers if scorer.usage is not None), None)

    def prepare(self) -> None:
        """Prepare all scorers."""
        for scorer in self.scorers:
            scorer.prepare()

    def check(self, rows: Sequence[Answers]) -> None:
        """Check the rows against all scorers."""
        for scorer in self.scorers:
            scorer.check(rows)

    def estimate(self, rows: Sequence[Answers]) -> Estimate:
        """Add up the estimates of all scorers."""
        return sum((scorer.estimate(rows) for scorer in self.scorers), Estimate())

    def score(self, rows: Sequence[Answers]) -> list[list[float | None]]:
        """Return the combined scores; a score that is not finite counts as missing."""
        self.parts = {name: scorer.score(rows) for name, scorer in self._scorers.items()}
        weights = [self._weights[name] for name in self.parts]
        by_prompt = zip(*self.parts.values(), strict=True)
        return [self._combine_answers(list(zip(*scores, strict=True)), weights) for scores in by_prompt]

    def _combine_answers(
        self, answers: Sequence[Sequence[float | None]], weights: Sequence[float]
    ) -> list[float | None]:
        """Combine one prompt's scores; ``answers`` holds every scorer's score for each answer."""
        complete = [k for k, scores in enumerate(answers) if all(x is not None and math.isfinite(x) for x in scores)]
        combined: list[float | None] = [None] * len(answers)
        if complete:
            columns = [normalize(column, self._how) for column in zip(*(answers[k] for k in complete), strict=True)]  # type: ignore[arg-type]
            for k, scores in zip(complete, zip(*columns, strict=True), strict=True):
                # fsum rounds only once, so the result does not depend on the order of the annotators
                combined[k] = math.fsum(weight * score for weight, score in zip(weights, scores, strict=True))
        return combined


def count_unscored(by_scorer: Mapping[str, Scores]) -> dict[str, int]:
    """Count the answers that each scorer left without a score, by the scorer's name."""
    return {
        name: sum(x is None or not math.isfinite(x) for row in scores for x in row)
        for name, scores in by_scorer.items()
    }


def make_judge(name: str, options: JudgeOptions) -> Judge:
    """Create a judge by name: a scorer, or ``human:FILE`` for stored human verdicts."""
    kind, _, rest = name.partition(":")
    if kind == "human" and rest:
        return HumanJudge(Path(rest).expanduser())
    return make_scorer(name, options, known=JUDGES)


def check_judges_new_answers(name: str) -> None:
    """Raise :class:`SimpoError` for a judge that cannot judge new answers, only those it has stored verdicts on."""
    if name.partition(":")[0] == "human":
        raise SimpoError(f"{name}: has verdicts on other answers only; to judge new answers, use one of {ANNOTATORS}")


def make_annotator(annotator: Annotator, options: JudgeOptions, normalization: Normalization | None = None) -> Scorer:
    """Create the scorer that an ``annotator`` key describes.

    ``annotator`` is a scorer's name, or a mapping from several names to weights; their scores are then normalized by
    ``normalization``, which defaults to ``zscore``.
    """
    names = annotator_names(annotator, normalization)
    if isinstance(annotator, str):
        return make_scorer(annotator, options)
    scorers = {name: make_scorer(name, options) for name in names}
    return CombinedScorer(scorers, annotator, normalization or "zscore")


def make_scorer(name: str, options: JudgeOptions, *, known: str = ANNOTATORS) -> Scorer:
    """Create a scorer by name; ``known`` are the names to list in error messages."""
    kind, _, rest = name.partition(":")
    if name == "api":
        if options.client is None:
            raise SimpoError("judge api: no server; set --judge_url and --judge_model")
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
    raise SimpoError(f"unknown judge {name!r}{nearest(name, known.split(', '))}; choose one of {known}")
