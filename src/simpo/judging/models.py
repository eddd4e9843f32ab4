"""Models as scorers: the log-probabilities of a language model, the rewards of a reward model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simpo.data.encoding import Encoder
from simpo.data.formats import Comparison
from simpo.data.messages import Response
from simpo.data.rendering import Rendered, Renderer
from simpo.data.rows import BadRow
from simpo.errors import SimpoError
from simpo.judging.protocol import Answers, Scorer
from simpo.models.checkpoint import Limits, model_digest, with_dtype
from simpo.models.devices import device
from simpo.models.loading import load_model, load_tokenizer
from simpo.models.reward import gated_scores, load_reward_model
from simpo.models.settings import ModelArguments
from simpo.packing.layout import TokenizedComparison
from simpo.packing.scoring import score_answers, score_responses
from simpo.runs.log import Log
from simpo.runs.terminal import progress

_PROMPTS_PER_PART = 64  # between two updates of the progress
_BATCH_TOKENS = 16384


class AnswerTokens:
    """Encodes answers for one tokenizer, through the chat template and under the same invariants as training data.

    Raises:
        SimpoError: the tokenizer or its chat template cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(tokenizer, self._encoder.literal, whole_answers=False)
        self._end = self._renderer.end

    def encode(self, rows: Sequence[Answers], limits: Limits) -> list[TokenizedComparison]:
        """One comparison per row; a response ends with the end-of-turn token, and an empty one is that alone."""
        rendered = [self._render(row) for row in rows]
        groups = self._encoder.encode_groups([(one.texts, one.marker) for one in rendered])
        found = [self._comparison(*parts) for parts in zip(rows, rendered, groups, strict=True)]
        for row, comparison in zip(rows, found, strict=True):
            length = len(comparison.prompt_ids) + max(map(len, comparison.response_ids))
            ids = itertools.chain(comparison.prompt_ids, *comparison.response_ids)
            if fault := limits.fault(length, ids):
                raise SimpoError(f"prompt {row.id}: {fault}")
        return found

    def _render(self, row: Answers) -> Rendered:
        responses: list[Response] = [text for text in row.responses if not self._is_empty(text)]
        if not isinstance(row.prompt, str):
            responses = [{"role": "assistant", "content": text} for text in responses]
        try:
            comparison = Comparison(row.prompt, tuple(responses), f"prompt {row.id}", context=row.context)
            return self._renderer.render(comparison)
        except BadRow as error:
            raise SimpoError(f"prompt {row.id}: {error}") from error

    def _comparison(self, row: Answers, rendered: Rendered, ids: list[list[int]]) -> TokenizedComparison:
        """Combine the encoded responses with the empty ones, which were not rendered."""
        encoded = iter(
            [*self._encoder.encode_following(ids[0], answer.text, whole, rendered.marker), answer.end.token_id]
            for answer, whole in zip(rendered.answers, ids[1:], strict=True)
        )
        responses = [[self._end.token_id] if self._is_empty(text) else next(encoded) for text in row.responses]
        prompt = self._encoder.with_one_bos(ids[0])
        if not prompt:
            raise SimpoError(f"prompt {row.id}: empty prompt")
        return TokenizedComparison(prompt, responses)

    def _is_empty(self, text: str) -> bool:
        return not text.replace(self._end.text, "").strip()


class ModelScorer(Scorer):
    """A model as a scorer: ``logp``, the mean log-probability of an answer, or ``reward``, a reward model's score.

    A mean log-probability is per token, the end-of-turn token included, in nats: SimPO's reward divided by beta. A
    reward model is a sequence classifier with one label, read at the end-of-turn token, or a model with several labels,
    such as ArmoRM, whose own code computes the score.
    """

    def __init__(self, kind: str, model: ModelArguments, log: Log) -> None:
        """Load the tokenizer; the weights follow with :meth:`prepare` or the first scores.

        Weights are bf16 on an accelerator and fp32 on a CPU, unless ``dtype`` is given.
        """
        self._kind = kind
        self._arguments = with_dtype(model)
        self._tokens = AnswerTokens(load_tokenizer(model.model_name_or_path, model))
        self._log = log
        self._model: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """Digest and type of the weights."""
        return {"judge": self._kind, "model": model_digest(self._arguments), "dtype": self._arguments.dtype}

    def prepare(self) -> None:
        """Load the weights unless they are loaded; raises :class:`SimpoError` for a model of another kind."""
        if self._model is not None:
            return
        name = self._arguments.model_name_or_path
        if self._kind == "logp":
            model: Any = load_model(name, self._arguments)
        else:
            try:
                model = load_reward_model(self._arguments, gated=True)
            except SimpoError as error:
                reason = str(error).removeprefix("model_name_or_path: ")
                raise SimpoError(f"reward:{name}: {reason}") from error
        self._model = model.to(device()).eval()

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """The model's scores; raises :class:`SimpoError` if a row does not fit the model."""
        self.prepare()
        limits = Limits.of(self._model.config)
        scores: list[list[float]] = []
        with torch.no_grad(), progress(f"prompts scored by {self._kind}", len(rows), 0, self._log) as advance:
            for start in range(0, len(rows), _PROMPTS_PER_PART):
                part = rows[start : start + _PROMPTS_PER_PART]
                comparisons = self._tokens.encode(part, limits)
                flat = iter(self._flat_scores(comparisons).tolist())
                scores += [[next(flat) for _ in one.response_ids] for one in comparisons]
                advance(len(part))
        return scores

    def _flat_scores(self, comparisons: Sequence[TokenizedComparison]) -> Tensor:
        """``[R]`` one number per response, comparison by comparison."""
        longest = max(max(one.packed_length, one.padded_length) for one in comparisons)
        tokens = max(_BATCH_TOKENS, longest)
        if self._kind == "logp":
            return score_responses(self._model, comparisons, max_batch_tokens=tokens).avg
        if self._model.config.num_labels != 1:
            return gated_scores(self._model, comparisons)
        return score_answers(self._model, comparisons, max_batch_tokens=tokens)
