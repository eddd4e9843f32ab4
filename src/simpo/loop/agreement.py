"""What judges behind a server will be sent in all rounds, which the user is asked about once, before the first."""

from __future__ import annotations

from itertools import product

from simpo.client import agree
from simpo.data.prompts import PlainPrompt, read_prompts
from simpo.evaluation.answers import Answerer
from simpo.judges.pairwise import PairwiseApiJudge
from simpo.judges.protocol import Answers, Pair
from simpo.judges.registry import JudgeOptions, make_annotator, make_judge
from simpo.judges.tournament import TournamentScorer
from simpo.loop.settings import LoopRecipe, as_it_is
from simpo.sampling.job import PromptArguments, Say


def agree_to_rounds(recipe: LoopRecipe, options: JudgeOptions, rounds: int, say: Say) -> None:
    """Ask the user about the requests of so many rounds, estimated with answers as long as they may be.

    Args:
        recipe: of the loop.
        options: what annotator and judges need.
        rounds: how many are left.
        say: gets what will be sent.

    Raises:
        SimpoError: the user does not agree, or cannot be asked; nothing has been computed.
    """
    annotator = make_annotator(recipe.settings.annotator, options)
    judges = [make_judge(name, options) for name in recipe.judges]
    answerer = Answerer(as_it_is(recipe.model), recipe.sampling)
    if isinstance(annotator, TournamentScorer):
        answers = [answerer.stand_in(f"a{k}") for k in range(recipe.sampling.n)]
        rows = [Answers(prompt.id, prompt.content, answers) for prompt in _prompts(recipe.asked)]
        agree(annotator.estimate(rows) * rounds, yes=recipe.settings.yes, say=say)
    for judge in judges:
        if isinstance(judge, PairwiseApiJudge):
            a, b = ([answerer.stand_in(f"{side}{k}") for k in range(recipe.settings.eval_n)] for side in "ab")
            pairs = [Pair(p.id, p.content, *two) for p in _prompts(recipe.held_out) for two in product(a, b)]
            agree(judge.estimate(pairs) * rounds, yes=recipe.settings.yes, say=say)


def _prompts(source: PromptArguments) -> list[PlainPrompt]:
    return read_prompts(source.rows())[0]
