"""A reward model as a scorer: a language model with one number for an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification

from simpo.errors import SimpoError
from simpo.judges.models import ModelScorer
from simpo.packing.comparison import TokenizedComparison
from simpo.training.models import ModelArguments


class RewardModelScorer(ModelScorer):
    """Scores an answer with a sequence classifier of one label, read at the end-of-turn token."""

    kind: ClassVar[str] = "reward"

    def load(self, arguments: ModelArguments) -> Any:
        """The reward model.

        Raises:
            SimpoError: as :func:`load_reward_model`.
        """
        return load_reward_model(arguments)

    def score_tokens(self, model: Any, comparisons: Sequence[TokenizedComparison]) -> list[list[float]]:
        """Rewards, each sequence by itself, so that nothing is padded."""
        return [[_reward(model, one.prompt_ids + ids) for ids in one.response_ids] for one in comparisons]


def load_reward_model(arguments: ModelArguments) -> Any:
    """A sequence classifier of one label that reads its number from the last token.

    Raises:
        SimpoError: it cannot be loaded, lacks the weights of a head, or has several labels.
    """
    name = arguments.model_name_or_path
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
            dtype=arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype or "float32"),
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SimpoError(f"reward:{name}: cannot be loaded: {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        raise SimpoError(f"reward:{name}: not a reward model: its files have no {missing[0]}")
    if model.config.num_labels != 1:
        raise SimpoError(f"reward:{name}: {model.config.num_labels} labels; a reward model has one")
    # The head is read at the last token that is not padding; where padding is the end-of-turn token, one too early.
    model.config.get_text_config().pad_token_id = None
    return model


def _reward(model: Any, ids: list[int]) -> float:
    return float(model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits)
