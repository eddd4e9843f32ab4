"""What scorers that are models have in common: loaded when needed, fed as training would feed them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from simpo.judges.protocol import Answers
from simpo.judges.tokens import AnswerTokens
from simpo.packing.comparison import TokenizedComparison
from simpo.progress import progress
from simpo.training.device import device, with_dtype
from simpo.training.identity import model_digest
from simpo.training.limits import Limits
from simpo.training.model_arguments import ModelArguments
from simpo.training.models import load_tokenizer

_AT_ONCE = 64  # prompts between two looks at the progress
_BATCH_TOKENS = 16384


class ModelScorer(ABC):
    """A model as a scorer."""

    kind: ClassVar[str]

    def __init__(self, model: ModelArguments, say: Callable[[str], None]) -> None:
        """Read the tokenizer; the weights follow with the first scores.

        Weights are bf16 on an accelerator and fp32 on a CPU unless ``dtype`` says otherwise.

        Args:
            model: which.
            say: gets lines of progress.

        Raises:
            SimpoError: there is no such model.
        """
        self._arguments = with_dtype(model)
        self._tokens = AnswerTokens(load_tokenizer(model.model_name_or_path, model))
        self._say = say
        self._model: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """Digest and type of the weights."""
        return {"judge": self.kind, "model": model_digest(self._arguments), "dtype": self._arguments.dtype}

    def open(self) -> None:
        """Load the weights, unless that is done.

        Raises:
            SimpoError: the model cannot be loaded.
        """
        if self._model is None:
            self._model = self.load(self._arguments).to(device()).eval()

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """The model's scores.

        Raises:
            SimpoError: the model cannot be loaded, or a row cannot be read by it.
        """
        self.open()
        limits = Limits.of(self._model.config)
        scores: list[list[float]] = []
        with torch.no_grad(), progress(f"prompts scored by {self.kind}", len(rows), 0, self._say) as advance:
            for start in range(0, len(rows), _AT_ONCE):
                part = rows[start : start + _AT_ONCE]
                scores += self._score_part(self._tokens.encode(part, limits))
                advance(len(part))
        return scores

    @abstractmethod
    def load(self, arguments: ModelArguments) -> Any:
        """The model.

        Raises:
            SimpoError: it cannot be loaded, or is of another kind.
        """

    @abstractmethod
    def flat_scores(self, model: Any, comparisons: Sequence[TokenizedComparison], max_batch_tokens: int) -> Tensor:
        """``[R]`` one number for every response of every comparison, in forwards of at most so many tokens."""

    def _score_part(self, comparisons: Sequence[TokenizedComparison]) -> list[list[float]]:
        longest = max(max(one.packed_length, one.padded_length) for one in comparisons)
        scores = iter(self.flat_scores(self._model, comparisons, max(_BATCH_TOKENS, longest)).tolist())
        return [[next(scores) for _ in one.response_ids] for one in comparisons]
