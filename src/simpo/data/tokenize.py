"""Comparisons to token ids: one ``datasets.Dataset`` of prompts with their responses, best first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import pyarrow.compute as pc
from datasets import Dataset, List, Value
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

__all__ = ["Comparisons", "Prepared", "TokenizeSettings", "check_rankings", "end_token_id", "prepare"]


def prepare(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, *, label: str = "train"
) -> Prepared:
    """Tokenize a data set of comparisons; the result is cached with the data set.

    K-wise rows have ``scores``, the highest first; a data set of pairs only has no such column.

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
    if (found := already_tokenized(dataset, label, Comparisons.noun)) is not None:
        return found
    prepared = prepare_rows(dataset, tokenizer, Comparisons(tokenizer, settings, label))
    if prepared.dataset.with_format("arrow")["scores"].null_count == len(prepared.dataset):
        prepared = replace(prepared, dataset=prepared.dataset.remove_columns("scores"))
    if settings.truncation == "paper":
        prepared.report.notices.append(
            "truncation: paper cuts both responses of an overlong comparison to "
            f"{settings.max_length - settings.prompt_limit} tokens and cut ones have no end-of-turn token"
        )
    return prepared


def check_rankings(rows: Dataset, label: str) -> None:
    """Refuse comparisons that cannot be ranked.

    Raises:
        SimpoError: a row has one response, more than two without scores, or scores that do not fall from the best to
            the worst.
    """
    table = rows.with_format("arrow")
    counts = pc.list_value_length(table["response_ids"])
    scores = table["scores"].to_pylist() if "scores" in rows.column_names else [None] * len(rows)
    for row, (count, given) in enumerate(zip(counts.to_pylist(), scores, strict=True)):
        if count < 2:
            raise SimpoError(f"{label} row {row} has one response; at least two are compared")
        if given is None and count > 2:
            raise SimpoError(f"{label} row {row} has {count} responses and no scores, which say how they are ranked")
        if given is not None and not (len(given) == count and _falling(given)):
            raise SimpoError(f"{label} row {row}: scores are one a response, the best first, and not all equal")


def _falling(scores: list[float]) -> bool:
    return all(a >= b for a, b in pairwise(scores)) and scores[0] > scores[-1]  # NaN is neither


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


class Comparisons(Tokenization[Rendered]):
    """A row becomes a prompt and its responses."""

    columns: ClassVar = {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "scores": List(Value("float64"))}
    noun = "comparisons"
    shapes = f"{SHAPES}; for objective kto also {{prompt, completion, label}}"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, label: str) -> None:
        super().__init__(tokenizer, settings, label)
        self._end = end_token_id(tokenizer, settings)

    def check_shape(self, row: Mapping[str, Any]) -> None:  # noqa: D102
        check_shape(row)

    def drafts(self, row: Mapping[str, Any], where: str) -> list[Draft[Rendered]]:  # noqa: D102
        comparison = recognise(row, where)
        return [Draft(self.renderer.render(comparison), comparison.extra, {"scores": comparison.scores})]

    def outcome(self, rendered: Rendered, ids: list[list[int]]) -> tuple[Mapping[str, Any], list[str]]:
        """Ids with BOS and end-of-turn token, within the limits."""
        prompt = self.encoder.one_bos(ids[0])
        responses = [
            self._ended(self.encoder.following(ids[0], text, whole, rendered.marker), end)
            for text, whole, end in zip(rendered.responses, ids[1:], rendered.ends, strict=True)
        ]
        if not prompt:
            raise BadRow("empty prompt")
        if len(set(map(tuple, responses))) < len(responses):
            raise BadRow("identical responses")
        fitted = fit(prompt, responses, self.settings, self.bos)
        return {"prompt_ids": fitted.prompt, "response_ids": fitted.responses}, fitted.status

    def nothing_fits(self, mapped: Dataset) -> str:  # noqa: D102
        return shortest(mapped, self.settings, "comparison")

    def _ended(self, response: list[int], end: int) -> list[int]:
        end = self._end if self.settings.paper_tokenization else end
        return response if response[-1:] == [end] else [*response, end]
