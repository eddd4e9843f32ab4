"""A reward model as a scorer: a language model with one number for an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from simpo.errors import SimpoError
from simpo.judges.models import ModelScorer
from simpo.packing.comparison import TokenizedComparison
from simpo.packing.rewards import score_answers
from simpo.training.model_arguments import ModelArguments
from simpo.training.reward_model import gated_scores, load_reward_model


class RewardModelScorer(ModelScorer):
    """Scores an answer with a sequence classifier of one label, read at the end-of-turn token.

    A model of several labels, such as ArmoRM, is asked for its own ``score``, which its code makes of them.
    """

    kind: ClassVar[str] = "reward"

    def load(self, arguments: ModelArguments) -> Any:
        """The reward model, an adapter included.

        Raises:
            SimpoError: it cannot be loaded, lacks the weights of a head, or has several labels.
        """
        try:
            return load_reward_model(arguments, gated=True)
        except SimpoError as error:
            reason = str(error).removeprefix("model_name_or_path: ")
            raise SimpoError(f"reward:{arguments.model_name_or_path}: {reason}") from error

    def flat_scores(self, model: Any, comparisons: Sequence[TokenizedComparison], max_batch_tokens: int) -> Tensor:
        """``[R]`` rewards."""
        if model.config.num_labels != 1:
            return gated_scores(model, comparisons)
        return score_answers(model, comparisons, max_batch_tokens=max_batch_tokens)
