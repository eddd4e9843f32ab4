"""Models as scorers: a policy's log-probabilities, a reward model's rewards."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simpo.data.encoding import Encoder
from simpo.data.formats import Comparison, Response
from simpo.data.rows import BadRow
from simpo.data.templates import Rendered, Renderer
from simpo.errors import SimpoError
from simpo.judging.protocol import Answers
from simpo.models.identity import model_digest
from simpo.models.limits import Limits
from simpo.models.loading import device, load_model, load_tokenizer, with_dtype
from simpo.models.reward import gated_scores, load_reward_model
from simpo.models.settings import ModelArguments
from simpo.packing.layout import TokenizedComparison
from simpo.packing.scoring import score_answers, score_responses
from simpo.runs.progress import progress

# ---- Answers as token ids, as training would read them: through the chat template, under the token
# invariants.


class AnswerTokens:
    """Encodes answers for one tokenizer.

    Raises:
        SimpoError: the tokenizer or its chat template cannot serve.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(tokenizer, self._encoder.literal)
        self._end = self._renderer.end

    def encode(self, rows: Sequence[Answers], limits: Limits) -> list[TokenizedComparison]:
        """One comparison for every row; a response ends with the end-of-turn token, and an empty one is only that.

        Args:
            rows: prompts with their responses.
            limits: of the model.

        Raises:
            SimpoError: a row cannot be rendered, is too long or has a token that the model does not know; names it.
        """
        rendered = [self._render(row) for row in rows]
        groups = self._encoder.encode_groups(rendered)
        found = [self._comparison(*parts) for parts in zip(rows, rendered, groups, strict=True)]
        for row, comparison in zip(rows, found, strict=True):
            length = len(comparison.prompt_ids) + max(map(len, comparison.response_ids))
            ids = itertools.chain(comparison.prompt_ids, *comparison.response_ids)
            if fault := limits.fault(length, ids):
                raise SimpoError(f"prompt {row.id}: {fault}")
        return found

    def _render(self, row: Answers) -> Rendered:
        said: list[Response] = [text for text in row.responses if self._says_something(text)]
        if not isinstance(row.prompt, str):
            said = [{"role": "assistant", "content": text} for text in said]
        try:
            return self._renderer.render(Comparison(row.prompt, tuple(said), f"prompt {row.id}", context=row.context))
        except BadRow as error:
            raise SimpoError(f"prompt {row.id}: {error}") from error

    def _comparison(self, row: Answers, rendered: Rendered, ids: list[list[int]]) -> TokenizedComparison:
        said = iter(
            [*self._encoder.following(ids[0], text, whole, rendered.marker), end]
            for text, whole, end in zip(rendered.responses, ids[1:], rendered.ends, strict=True)
        )
        responses = [next(said) if self._says_something(text) else [self._end.token_id] for text in row.responses]
        prompt = self._encoder.one_bos(ids[0])
        if not prompt:
            raise SimpoError(f"prompt {row.id}: empty prompt")
        return TokenizedComparison(prompt, responses)

    def _says_something(self, text: str) -> bool:
        return bool(text.replace(self._end.text, "").strip())


_AT_ONCE = 64  # prompts between two looks at the progress


_BATCH_TOKENS = 16384


class ModelScorer(ABC):
    """A model as a scorer."""

    kind: ClassVar[str]

    def __init__(self, model: ModelArguments, log: Callable[[str], None]) -> None:
        """Read the tokenizer; the weights follow with the first scores.

        Weights are bf16 on an accelerator and fp32 on a CPU unless ``dtype`` says otherwise.

        Args:
            model: which.
            log: called with lines of progress.

        Raises:
            SimpoError: there is no such model.
        """
        self._arguments = with_dtype(model)
        self._tokens = AnswerTokens(load_tokenizer(model.model_name_or_path, model))
        self._log = log
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
        with torch.no_grad(), progress(f"prompts scored by {self.kind}", len(rows), 0, self._log) as advance:
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


# ---- A language model as a scorer: how likely it finds an answer, token by token.


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


# ---- A reward model as a scorer: a language model with one number for an output.


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
