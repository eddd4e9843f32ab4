"""Comparisons to token ids: one ``datasets.Dataset`` of prompts with their responses, best first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Dataset, List
from transformers import PreTrainedTokenizerBase

from simpo.data.formats import SHAPES, check_shape, recognise
from simpo.data.mapping import (
    TOKENS,
    Draft,
    Prepared,
    Tokenization,
    already_tokenized,
    check_rows,
    prepare_rows,
    shortest,
)
from simpo.data.rows import BadRow
from simpo.data.settings import TokenizeSettings
from simpo.data.templates import Rendered, end_of_turn
from simpo.data.truncation import fit
from simpo.errors import SimpoError

__all__ = ["Prepared", "TokenizeSettings", "end_token_id", "prepare"]


def prepare(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, *, label: str = "train"
) -> Prepared:
    """Tokenize a data set of comparisons; the result is cached with the data set.

    Args:
        dataset: rows as :func:`simpo.data.sources.load_rows` gives them, or any data set with the same
            columns. One that has ``prompt_ids`` and ``response_ids`` is returned as it is.
        tokenizer: a fast tokenizer. If it has a chat template, everything is rendered with it.
        settings: lengths, truncation and how to treat bad rows.
        label: names the data set in the report and in messages.

    Raises:
        SimpoError: no row of a known shape, too many bad rows, nothing that fits, or a tokenizer or chat
            template that cannot serve.
    """
    check_rows(dataset, label)
    if (found := already_tokenized(dataset, label, _Comparisons.noun)) is not None:
        return found
    prepared = prepare_rows(dataset, tokenizer, _Comparisons(tokenizer, settings, label))
    if settings.truncation == "paper":
        prepared.report.notices.append(
            "truncation: paper cuts both responses of an overlong comparison to "
            f"{settings.max_length - settings.prompt_limit} tokens and cut ones have no end-of-turn token"
        )
    return prepared


def end_token_id(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> int:
    """The token that ends every response.

    The paper's code ended responses with EOS, whatever the template's end-of-turn token.

    Raises:
        SimpoError: there is none.
    """
    if not settings.paper_tokenization:
        return end_of_turn(tokenizer).token_id
    if tokenizer.eos_token_id is None:
        raise SimpoError("paper_tokenization: the tokenizer has no EOS; set an eos_token")
    return tokenizer.eos_token_id


class _Comparisons(Tokenization[Rendered]):
    """A row becomes a prompt and its responses."""

    columns: ClassVar = {"prompt_ids": TOKENS, "response_ids": List(TOKENS)}
    noun = "comparisons"
    shapes = SHAPES

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, label: str) -> None:
        super().__init__(tokenizer, settings, label)
        self._end = end_token_id(tokenizer, settings)

    def check_shape(self, row: Mapping[str, Any]) -> None:
        check_shape(row)

    def draft(self, row: Mapping[str, Any], where: str) -> Draft[Rendered]:
        comparison = recognise(row, where)
        return Draft(self.renderer.render(comparison), comparison.extra)

    def outcome(self, rendered: Rendered, ids: list[list[int]]) -> tuple[Mapping[str, Any], list[str]]:
        """Ids with BOS and end-of-turn token, within the limits."""
        prompt = self.encoder.one_bos(ids[0])
        responses = [
            self._ended(self.encoder.following(ids[0], text, whole, rendered.marker))
            for text, whole in zip(rendered.responses, ids[1:], strict=True)
        ]
        if not prompt:
            raise BadRow("empty prompt")
        if len(set(map(tuple, responses))) < len(responses):
            raise BadRow("identical responses")
        fitted = fit(prompt, responses, self.settings, self.bos)
        return {"prompt_ids": fitted.prompt, "response_ids": fitted.responses}, fitted.status

    def nothing_fits(self, mapped: Dataset) -> str:
        return shortest(mapped, self.settings, "comparison")

    def _ended(self, response: list[int]) -> list[int]:
        return response if response[-1:] == [self._end] else [*response, self._end]
