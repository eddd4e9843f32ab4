"""A language model as a scorer: how likely it finds an answer, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from simpo.judges.models import ModelScorer
from simpo.packing.comparison import TokenizedComparison
from simpo.packing.scoring import score_responses
from simpo.training.model_arguments import ModelArguments
from simpo.training.models import load_model


class LogpScorer(ModelScorer):
    """Scores an answer with its mean log-probability per token, the end-of-turn token included, in nats.

    That is SimPO's reward divided by beta.
    """

    kind: ClassVar[str] = "logp"

    def load(self, arguments: ModelArguments) -> Any:
        """The language model.

        Raises:
            SimpoError: it cannot be loaded.
        """
        return load_model(arguments.model_name_or_path, arguments)

    def flat_scores(self, model: Any, comparisons: Sequence[TokenizedComparison], max_batch_tokens: int) -> Tensor:
        """``[R]`` mean log-probabilities."""
        return score_responses(model, comparisons, max_batch_tokens=max_batch_tokens).avg
