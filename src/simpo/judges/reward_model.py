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
from simpo.training.reward_model import load_reward_model


class RewardModelScorer(ModelScorer):
    """Scores an answer with a sequence classifier of one label, read at the end-of-turn token."""

    kind: ClassVar[str] = "reward"

    def load(self, arguments: ModelArguments) -> Any:
        """The reward model, an adapter included.

        Raises:
            SimpoError: it cannot be loaded, lacks the weights of a head, or has several labels.
        """
        try:
            return load_reward_model(arguments)
        except SimpoError as error:
            reason = str(error).removeprefix("model_name_or_path: ")
            raise SimpoError(f"reward:{arguments.model_name_or_path}: {reason}") from error

    def flat_scores(self, model: Any, comparisons: Sequence[TokenizedComparison], max_batch_tokens: int) -> Tensor:
        """``[R]`` rewards."""
        return score_answers(model, comparisons, max_batch_tokens=max_batch_tokens)
