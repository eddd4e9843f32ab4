"""A language model as a scorer: how likely it finds an answer, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from simpo.judges.placement import on_device, with_dtype
from simpo.judges.protocol import Answers
from simpo.judges.tokens import AnswerTokens
from simpo.packing.scoring import score_responses
from simpo.training.identity import model_digest
from simpo.training.models import ModelArguments, load_model, load_tokenizer


class LogpScorer:
    """Scores an answer with its mean log-probability per token, the end-of-turn token included, in nats.

    That is SimPO's reward divided by beta. The model is loaded when it is first needed.
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
        return {"judge": "logp", "model": model_digest(self._arguments), "dtype": self._arguments.dtype}

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """The answers' mean log-probabilities.

        Raises:
            SimpoError: the model cannot be loaded, or a row does not fit it.
        """
        if self._model is None:
            self._model = on_device(load_model(self._arguments.model_name_or_path, self._arguments))
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        comparisons = self._tokens.encode(rows, context=context)
        longest = max(max(one.packed_length, one.padded_length) for one in comparisons)
        with torch.no_grad():
            scores = iter(score_responses(self._model, comparisons, max_batch_tokens=max(16384, longest)).avg.tolist())
        return [[next(scores) for _ in row.responses] for row in rows]
