"""Judges and scorers by the names that the command line gives them."""

from __future__ import annotations

from pathlib import Path

from simpo.config.coercion import nearest
from simpo.errors import SimpoError
from simpo.judging.combined import CombinedScorer
from simpo.judging.models import ModelScorer
from simpo.judging.pairwise import PairwiseApiJudge, TournamentScorer
from simpo.judging.protocol import Judge, Scorer
from simpo.judging.scored import ExactScorer, FunctionScorer, HumanJudge, ScorerJudge
from simpo.judging.settings import ANNOTATORS, JUDGES, SCORERS, Annotator, JudgeOptions, Normalization, annotator_names
from simpo.judging.verifiers import IFBenchScorer, ReasoningGymScorer
from simpo.models.settings import ModelArguments


def make_judge(name: str, options: JudgeOptions) -> Judge:
    """The judge with this name; every scorer is also a judge."""
    kind, _, rest = name.partition(":")
    if kind == "human" and rest:
        return HumanJudge(Path(rest).expanduser())
    if name == "api":
        return _api(options)
    return ScorerJudge(make_scorer(name, options, known=JUDGES))


def check_judges_anew(name: str) -> None:
    """Reject a judge whose verdicts belong to one fixed set of answers, where every run has new answers."""
    if name.partition(":")[0] == "human":
        raise SimpoError(
            f"{name}: its verdicts belong to other answers; new answers can be judged by one of {ANNOTATORS}"
        )


def make_annotator(annotator: Annotator, options: JudgeOptions, normalization: Normalization | None = None) -> Scorer:
    """The scorer that an ``annotator`` key names.

    ``annotator`` is the name of a scorer; ``api``, a judge that compares every two answers to a prompt; or the weights
    of several by their names, whose scores are normalized by ``normalization``, ``zscore`` if None.
    """
    names = annotator_names(annotator, normalization)
    if not isinstance(annotator, str):
        scorers = {name: make_annotator(name, options) for name in names}
        return CombinedScorer(scorers, annotator, normalization or "zscore")
    name = annotator
    return TournamentScorer(_api(options)) if name == "api" else make_scorer(name, options, known=ANNOTATORS)


def _api(options: JudgeOptions) -> PairwiseApiJudge:
    if options.client is None:
        raise SimpoError("judge api: name the server and the model with --judge_url and --judge_model")
    return PairwiseApiJudge(options.client, prompt=options.prompt, max_tokens=options.max_tokens, log=options.log)


def make_scorer(name: str, options: JudgeOptions, *, known: str = SCORERS) -> Scorer:
    """The scorer with this name; ``known`` are the names that an error message lists."""
    kind, _, rest = name.partition(":")
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
