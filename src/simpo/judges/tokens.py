"""Answers as token ids, as training would read them: through the chat template, under the token invariants."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from simpo.data.encoding import Encoder
from simpo.data.formats import Comparison, Response
from simpo.data.rows import BadRow
from simpo.data.templates import Rendered, Renderer
from simpo.errors import SimpoError
from simpo.judges.protocol import Answers
from simpo.packing.comparison import TokenizedComparison


class AnswerTokens:
    """Encodes answers for one tokenizer.

    Raises:
        SimpoError: the tokenizer or its chat template cannot serve.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(tokenizer, self._encoder.literal)
        self._end = self._renderer.end

    def encode(self, rows: Sequence[Answers], *, context: int | None = None) -> list[TokenizedComparison]:
        """One comparison for every row; a response ends with the end-of-turn token, and an empty one is only that.

        Args:
            rows: prompts with their responses.
            context: positions that the model has; None if it has no bound.

        Raises:
            SimpoError: a row cannot be rendered or is longer than the context; names it.
        """
        rendered = [self._render(row) for row in rows]
        groups = self._encoder.encode_groups(rendered)
        found = [self._comparison(*parts) for parts in zip(rows, rendered, groups, strict=True)]
        for row, comparison in zip(rows, found, strict=True):
            length = len(comparison.prompt_ids) + max(map(len, comparison.response_ids))
            if context is not None and length > context:
                raise SimpoError(
                    f"prompt {row.id}: {length:,} tokens with its answer; the model has room for {context:,}"
                )
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
