"""Unpaired feedback: single responses with a label, desirable or not, to token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyarrow.compute as pc
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.context import CONTEXT_COLUMNS, read_context
from simpo.data.formats import Comparison, is_comparison, read_responses
from simpo.data.mapping import TOKENS, Draft, Prepared, already_tokenized, check_rows, prepare_rows
from simpo.data.rows import BadRow, UnknownShape, columns_of, other_columns
from simpo.data.settings import TokenizeSettings
from simpo.data.shapes import first_canonical, read_label
from simpo.data.templates import Rendered
from simpo.data.tokenize import Comparisons
from simpo.errors import SimpoError

FEEDBACK_SHAPES = "{prompt, completion, label} (strings or message lists, with true or false, or 1 or 0)"
_COLUMNS = {"prompt", "completion", "label"}


def is_feedback(dataset: Dataset) -> bool:
    """Whether a data set, tokenized or not, has unpaired feedback, as its columns or its first row tell."""
    if "prompt_ids" in dataset.column_names or not len(dataset):
        return "label" in dataset.column_names
    row = first_canonical(dataset)
    return set(row) >= _COLUMNS and not is_comparison(row)


def prepare_feedback(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, *, label: str = "train"
) -> Prepared:
    """Tokenize single responses with labels; the result is cached with the data set and has the column ``label``.

    Args:
        dataset: rows as :func:`simpo.data.sources.load_rows` gives them, or any data set with the same columns. One
            that has ``prompt_ids`` and ``response_ids`` is returned as it is.
        tokenizer: a fast tokenizer. If it has a chat template, everything is rendered with it.
        settings: lengths, truncation and how to treat bad rows.
        label: names the data set in the report and in messages.

    Raises:
        SimpoError: no row of a known shape, too many bad rows, nothing that fits, labels that are all alike, or a
            tokenizer or chat template that cannot serve.
    """
    check_rows(dataset, label)
    prepared = already_tokenized(dataset, label, _Feedback.noun)
    if prepared is None:
        prepared = prepare_rows(dataset, tokenizer, _Feedback(tokenizer, settings, label))
    _check_labels(prepared.dataset, label)
    return prepared


def _check_labels(rows: Dataset, label: str) -> None:
    found = pc.unique(rows.with_format("arrow")["label"]).to_pylist()
    if len(found) < 2:
        raise SimpoError(
            f"{label}: the label of every row is {str(found[0]).lower()}; desirable (true) and undesirable (false) "
            "responses are needed"
        )


def recognise_feedback(row: Mapping[str, Any], where: str) -> tuple[Comparison, bool]:
    """A prompt with its one response, and whether that is desirable.

    Raises:
        UnknownShape: the row's columns are of another shape.
        BadRow: they are of this one, but their values are not.
    """
    _check_shape(row)
    label = read_label(row["label"])
    if label is None:
        raise BadRow("label is neither true nor false (1 or 0)")
    prompt, responses = read_responses(row["prompt"], (row["completion"],), ("completion",))
    prompt, found, context = read_context(row, prompt, responses)
    extra = other_columns(row, *_COLUMNS, *CONTEXT_COLUMNS)
    return Comparison(prompt, tuple(found), where, extra, context=context), label


def _check_shape(row: Mapping[str, Any]) -> None:
    if not set(row) >= _COLUMNS:
        raise UnknownShape(f"no recognised shape: columns {columns_of(row)}")


class _Feedback(Comparisons):
    """A row becomes a prompt, one response and a label."""

    columns: ClassVar = {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "label": Value("bool")}
    noun = "judged responses"
    shapes = FEEDBACK_SHAPES

    def check_shape(self, row: Mapping[str, Any]) -> None:
        _check_shape(row)

    def drafts(self, row: Mapping[str, Any], where: str) -> list[Draft[Rendered]]:
        comparison, label = recognise_feedback(row, where)
        return [Draft(self.renderer.render(comparison), comparison.extra, {"label": label})]
