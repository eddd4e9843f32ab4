"""A reward model as a scorer: a language model with one number for an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from simpo.errors import SimpoError
from simpo.judges.placement import on_device, with_dtype
from simpo.judges.protocol import Answers
from simpo.judges.tokens import AnswerTokens
from simpo.packing.comparison import TokenizedComparison
from simpo.training.identity import model_digest
from simpo.training.models import ModelArguments, load_tokenizer


class RewardModelScorer:
    """Scores an answer with a sequence classifier of one label, read at the end-of-turn token.

    The model is loaded when it is first needed.
    """

    def __init__(self, model: ModelArguments) -> None:
        """Read the tokenizer.

        Raises:
            SimpoError: there is no such model.
        """
        self._arguments = with_dtype(model)
        self._tokens = AnswerTokens(load_tokenizer(model.model_name_or_path, model))
        self._model: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """Digest and type of the weights."""
        return {"judge": "reward", "model": model_digest(self._arguments), "dtype": self._arguments.dtype}

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """The rewards of the answers.

        Raises:
            SimpoError: the model cannot be loaded or is no reward model, or a row does not fit it.
        """
        if self._model is None:
            self._model = on_device(load_reward_model(self._arguments))
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return score(self._model, self._tokens.encode(rows, context=context))


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


@torch.no_grad()
def score(model: Any, comparisons: Sequence[TokenizedComparison]) -> list[list[float]]:
    """The reward of every response, each sequence by itself, so that nothing is padded."""
    return [
        [
            float(model(input_ids=torch.tensor([one.prompt_ids + ids], device=model.device), use_cache=False).logits)
            for ids in one.response_ids
        ]
        for one in comparisons
    ]
