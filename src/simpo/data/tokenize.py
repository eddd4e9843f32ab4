"""Rows to token ids: one ``datasets.Dataset`` of comparisons and a report of every row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.encoding import Encoder
from simpo.data.formats import SHAPES, BadRow, UnknownShape, check_shape, recognise
from simpo.data.report import DataReport, is_used
from simpo.data.rows import WHERE, as_json, rows_of
from simpo.data.settings import TokenizeSettings
from simpo.data.templates import Rendered, Renderer, end_of_turn
from simpo.data.truncation import fit
from simpo.errors import SimpoError

__all__ = ["Prepared", "TokenizeSettings", "end_token_id", "prepare"]

COLUMNS = ("prompt_ids", "response_ids", "where", "extra")
_STATUS = "_status"
_FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "response_ids": List(List(Value("int32"))),
        "where": Value("string"),
        "extra": Value("string"),
        _STATUS: List(Value("string")),
    }
)
# Part of every fingerprint: raise it when the ids made from the same rows and settings change.
_FORMAT = 1
_BATCH = 256
_ROWS_LOOKED_AT = 1000
_SMALL = 2000
_ROWS_PER_PROCESS = 1000
_NAMED_BAD_ROWS = 5


@dataclass(frozen=True)
class Prepared:
    """A tokenized data set.

    Attributes:
        dataset: columns ``prompt_ids`` (list of int32, never empty), ``response_ids`` (list of lists of
            int32, best first), ``where`` and ``extra`` (a JSON object of the row's other columns).
        report: what became of every row.
    """

    dataset: Dataset
    report: DataReport


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
    if not isinstance(dataset, Dataset):
        raise SimpoError(f"{label}: a {type(dataset).__name__} instead of a datasets.Dataset; give one split")
    if {"prompt_ids", "response_ids"} <= set(dataset.column_names):
        report = DataReport(label, rows=len(dataset), used=len(dataset))
        report.notices.append("already tokenized: taken as it is")
        return Prepared(dataset, report)
    if not len(dataset):
        raise SimpoError(f"{label}: no rows")
    fingerprint = _fingerprint(dataset, tokenizer, settings, label)
    dataset = dataset.with_format(None)
    _check_shapes(dataset, label)
    mapped = dataset.map(
        _Tokenization(tokenizer, settings, label),
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_FEATURES,
        num_proc=_processes(len(dataset), settings.num_proc),
        new_fingerprint=fingerprint,
        desc=f"Tokenizing {label}",
    )
    return _finish(mapped, settings, label)


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


class _Tokenization:
    """The function that ``Dataset.map`` runs over batches of rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, label: str) -> None:
        self._settings = settings
        self._label = label
        self._bos = tokenizer.bos_token_id
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(
            tokenizer,
            self._encoder.literal,
            paper=settings.paper_tokenization,
            insert_system=settings.auto_insert_empty_system_msg,
        )
        self._end = end_token_id(tokenizer, settings)

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        rows = rows_of(batch, indices, self._label)
        drafts = [self._draft(row, where) for row, where in rows]
        ids = self._encode([draft.rendered for draft in drafts if draft.rendered])
        columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, _STATUS)}
        for draft in drafts:
            prompt, responses, status = self._outcome(next(ids)) if draft.rendered else ([], [], draft.status)
            values = (prompt, responses, draft.where, draft.extra, status)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        return columns

    def _draft(self, row: Mapping[str, Any], where: str) -> _Draft:
        try:
            comparison = recognise(row, where)
            rendered = self._renderer.render(comparison)
            _check_unicode(rendered)
        except BadRow as bad:
            return _Draft(where, status=[f"bad: {bad.reason}"])
        return _Draft(where, rendered, as_json(comparison.extra))

    def _encode(self, rendered: Sequence[Rendered]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Prompt and response ids of each comparison; all that need no special care in one call."""
        plain = [
            text
            for item in rendered
            if item.marker is None
            for text in (item.prompt, *(item.prompt + response for response in item.responses))
        ]
        encoded = iter(self._encoder.encode(plain))
        for item in rendered:
            if item.marker is None:
                yield self._split(next(encoded), [next(encoded) for _ in item.responses], item)
            else:
                yield self._split_marked(item, item.marker)

    def _split(self, prompt: list[int], whole: list[list[int]], item: Rendered) -> tuple[list[int], list[list[int]]]:
        """Responses are what follows the prompt's ids, or encoded alone where a token merged across."""
        return prompt, [
            ids[len(prompt) :]
            if self._encoder.splits(ids, prompt, text)
            else self._encoder.continuation(text, before=prompt)
            for ids, text in zip(whole, item.responses, strict=True)
        ]

    def _split_marked(self, item: Rendered, marker: str) -> tuple[list[int], list[list[int]]]:
        """The same for messages with special-token text in them."""
        prompt = self._encoder.encode_marked(item.prompt, marker)
        responses = []
        for text in item.responses:
            ids = self._encoder.encode_marked(item.prompt + text, marker)
            if self._encoder.splits(ids, prompt, text):
                responses.append(ids[len(prompt) :])
            else:
                responses.append(self._encoder.encode_marked(text, marker, before=prompt))
        return prompt, responses

    def _ended(self, response: list[int]) -> list[int]:
        return response if response[-1:] == [self._end] else [*response, self._end]

    def _outcome(self, ids: tuple[list[int], list[list[int]]]) -> tuple[list[int], list[list[int]], list[str]]:
        """Ids with BOS and end-of-turn token, within the limits, and the row's status."""
        prompt = self._encoder.one_bos(ids[0])
        responses = [self._ended(response) for response in ids[1]]
        if not prompt:
            return [], [], ["bad: empty prompt"]
        if len(set(map(tuple, responses))) < len(responses):
            return [], [], ["bad: identical responses"]
        fitted = fit(prompt, responses, self._settings, self._bos)
        status = [f"cut: {what}" for what in fitted.cut]
        if fitted.dropped:
            status = [f"dropped: {fitted.dropped}"]
        return fitted.prompt, fitted.responses, status


@dataclass(frozen=True)
class _Draft:
    """A row on its way: its text, or why it is bad."""

    where: str
    rendered: Rendered | None = None
    extra: str = "{}"
    status: list[str] = dataclasses.field(default_factory=list)


def _check_unicode(rendered: Rendered) -> None:
    try:
        "".join((rendered.prompt, *rendered.responses)).encode()
    except UnicodeEncodeError as error:
        raise BadRow("text that is not Unicode (half of a surrogate pair)") from error


def _check_shapes(dataset: Dataset, label: str) -> None:
    """Fail before the work if none of the first rows is of a known shape.

    Raises:
        SimpoError: so it is; names the columns found.
    """
    head = range(min(len(dataset), _ROWS_LOOKED_AT))
    unknown = None
    for row, where in rows_of(dataset[: len(head)], head, label):
        try:
            check_shape(row)
            return
        except UnknownShape as error:
            unknown = unknown or f"{where}: {error.reason}"
    raise SimpoError(f"{label}: no row of a recognised shape ({unknown}); accepted are {SHAPES}")


def _finish(mapped: Dataset, settings: TokenizeSettings, label: str) -> Prepared:
    """Read the status of every row, judge the whole, and keep the rows that are used."""
    columns = mapped.select_columns(["where", _STATUS])[:]
    statuses = list(zip(columns["where"], columns[_STATUS], strict=True))
    report = DataReport.of(label, statuses)
    _check_bad(report, statuses, settings)
    if not report.used:
        raise SimpoError(_nothing_fits(mapped, settings, label))
    if settings.truncation == "paper":
        report.notices.append(
            "truncation: paper cuts both responses of an overlong comparison to "
            f"{settings.max_length - settings.prompt_limit} tokens and cut ones have no end-of-turn token"
        )
    if report.used < report.rows:
        mapped = mapped.select([index for index, (_, entries) in enumerate(statuses) if is_used(entries)])
    return Prepared(mapped.remove_columns(_STATUS), report)


def _check_bad(report: DataReport, statuses: Sequence[tuple[str, list[str]]], settings: TokenizeSettings) -> None:
    bad = [
        f"{where}: {entry.removeprefix('bad: ')}"
        for where, entries in statuses
        for entry in entries
        if entry.startswith("bad: ")
    ]
    if bad and settings.on_bad_row == "error":
        raise SimpoError(f"{bad[0]}; mend the row, or set on_bad_row: skip")
    if len(bad) * 100 > report.rows:
        named = "; ".join(bad[:_NAMED_BAD_ROWS]) + ("; ..." if len(bad) > _NAMED_BAD_ROWS else "")
        raise SimpoError(f"{report.label}: {len(bad)} of {report.rows} rows are bad, more than 1%; mend them ({named})")


def _nothing_fits(mapped: Dataset, settings: TokenizeSettings, label: str) -> str:
    """Why no comparison is left: all that are not bad are too long."""
    lengths = [
        (len(prompt) + max(map(len, responses)), len(prompt))
        for prompt, responses in zip(mapped["prompt_ids"], mapped["response_ids"], strict=True)
        if responses
    ]
    total, prompt = min(lengths)
    return (
        f"{label}: no comparison fits max_length {settings.max_length}: the shortest has {total} tokens, "
        f"its prompt {prompt} (the shortest prompt has {min(prompt for _, prompt in lengths)} tokens); "
        "raise max_length"
    )


def _processes(rows: int, wanted: int | None) -> int | None:
    """Processes to map with; ``None`` is this one. Forking costs more than a small data set takes."""
    if rows < _SMALL:
        return None
    if wanted is None:
        # macOS and Windows cannot say which cores a process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(cores, rows // _ROWS_PER_PROCESS)
    return wanted if wanted > 1 else None


def _fingerprint(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, label: str) -> str:
    """Key of the cache: everything that the ids and statuses depend on.

    ``on_bad_row`` and ``num_proc`` are left out: they are about what is done with them.
    """
    chosen = dataclasses.asdict(settings)
    del chosen["on_bad_row"], chosen["num_proc"]
    parts = [
        _FORMAT,
        dataset._fingerprint,
        None if WHERE in dataset.column_names else label,
        chosen,
        _tokenizer_state(tokenizer),
    ]
    # Half a digest: datasets appends the process number and allows 64 characters in all.
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer does to a text; padding and truncation, which calls switch on and off, excepted."""
    if not tokenizer.is_fast:
        return {}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["padding"], backend["truncation"]
    return {
        "backend": backend,
        "template": tokenizer.chat_template,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
