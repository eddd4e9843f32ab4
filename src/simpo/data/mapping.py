"""Rows through a tokenization to a cached data set, with a report that accounts for every row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import frame_of
from simpo.data.encoding import Encoder, Texts
from simpo.data.rows import PART, WHERE, BadRow, DataReport, UnknownShape, as_json, columns_of, is_used, rows_of
from simpo.data.settings import TokenizeSettings
from simpo.data.shapes import FOREIGN_SHAPES, canonical, check_not_rendered
from simpo.data.templates import Renderer
from simpo.errors import SimpoError

TOKENS = List(Value("int32"))


_TEXT = Value("string")


_STATUS = "_status"


# Part of every fingerprint: raise it when the ids made from the same rows and settings change.
_FORMAT = 6


_BATCH = 256


_ROWS_LOOKED_AT = 1000


_SMALL = 2000


_ROWS_PER_PROCESS = 1000


T = TypeVar("T", bound=Texts)


@dataclass(frozen=True)
class Prepared:
    """A tokenized data set.

    Attributes:
        dataset: columns ``prompt_ids`` (list of int32, never empty), ``response_ids`` (list of lists of
            int32, best first), ``where`` and ``extra`` (a JSON object of the row's other columns). Conversations
            for supervised fine-tuning also have ``scored`` (list of lists of bool, as long as ``response_ids``), K-wise
            comparisons ``scores`` (list of float, descending) and single responses ``label`` (bool).
        report: what happened to every row.
    """

    dataset: Dataset
    report: DataReport


@dataclass(frozen=True)
class Draft(Generic[T]):
    """A row on its way to ids.

    Attributes:
        rendered: its text.
        extra: its other columns.
        values: of the columns that need no ids.
        read: which columns of another shape it was read from.
    """

    rendered: T
    extra: Mapping[str, Any]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: str | None = None


class Tokenization(ABC, Generic[T]):
    """The function that ``Dataset.map`` runs over batches of rows; a subclass says what a row becomes.

    Attributes:
        columns: name -> type of what a row becomes; ``where`` and ``extra`` are added to them.
        noun: what rows become, in the plural.
        shapes: the shapes of a row that are accepted.
    """

    columns: ClassVar[Mapping[str, Any]]
    noun: ClassVar[str]
    shapes: ClassVar[str]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, label: str) -> None:
        self.settings = settings
        self.label = label
        self.bos = tokenizer.bos_token_id
        self.encoder = Encoder(tokenizer)
        self._has_template = tokenizer.chat_template is not None
        self._frame = frame_of(tokenizer) if self._has_template else None
        self.renderer = Renderer(
            tokenizer,
            self.encoder.literal,
            settings.rendering,
            paper=settings.paper_tokenization,
            insert_system=settings.auto_insert_empty_system_msg,
        )

    def canonical(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
        """See :func:`simpo.data.shapes.canonical`."""
        return canonical(row)

    @abstractmethod
    def read(self, row: Mapping[str, Any], where: str) -> Any:
        """The content of a row; raises :class:`UnknownShape` or :class:`BadRow`."""

    @abstractmethod
    def drafts(self, row: Mapping[str, Any], where: str) -> list[Draft[T]]:
        """The text of each sequence that a row becomes; raises :class:`BadRow`."""

    @abstractmethod
    def outcome(self, rendered: T, ids: list[list[int]]) -> tuple[Mapping[str, Any], list[str]]:
        """Values of the columns that need the ids of a row's texts, and status entries (:meth:`DataReport.of`).

        Raises:
            BadRow: the ids cannot be used.
        """

    @abstractmethod
    def nothing_fits(self, mapped: Dataset) -> str:
        """Why no row is left, where all are too long."""

    def options(self) -> dict[str, Any]:
        """What the outcome depends on, in addition to rows and tokenizer."""
        options = dataclasses.asdict(self.settings)
        del options["on_bad_row"], options["num_proc"]  # about what is done with the outcome
        return options

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of a batch of rows."""
        rows = rows_of(batch, indices, self.label)
        drafts = [(draft, where) for row, where in rows for draft in self._checked_drafts(row, where)]
        ids = iter(self.encoder.encode_groups([draft.rendered for draft, _ in drafts if isinstance(draft, Draft)]))
        columns: dict[str, list[Any]] = {name: [] for name in (*self.columns, "where", "extra", _STATUS)}
        for draft, where in drafts:
            values, status = self._values(draft, next(ids)) if isinstance(draft, Draft) else _bad(draft)
            found = {"extra": "{}", **values, "where": where, _STATUS: status}
            for name, column in columns.items():
                column.append(found.get(name))
        return columns

    def _checked_drafts(self, row: Mapping[str, Any], where: str) -> Sequence[Draft[T] | BadRow]:
        try:
            row, read = self.canonical(row)
            if self._has_template:
                check_not_rendered(row, self._frame)
            drafts = self.drafts(row, where)
            for draft in drafts:
                _check_unicode(draft.rendered.texts)
        except BadRow as bad:
            return [bad]
        # a row that became several is reported once
        return [dataclasses.replace(drafts[0], read=read), *drafts[1:]]

    def _values(self, draft: Draft[T], ids: list[list[int]]) -> tuple[Mapping[str, Any], list[str]]:
        try:
            values, status = self.outcome(draft.rendered, ids)
        except BadRow as bad:
            values, status = _bad(bad)
        known = (
            draft.rendered.status
            if is_used(status)
            else [s for s in draft.rendered.status if s == PART or s.startswith("split: ")]
        )
        read = [f"read: {draft.read}"] if draft.read and is_used(status) else []
        status = [*read, *known, *status]
        return {**draft.values, **values, "extra": as_json(draft.extra)}, status


def prepare_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> Prepared:
    """Tokenize a data set; the result is cached with the data set.

    Args:
        dataset: rows that :func:`simpo.data.rows.check_dataset` accepted.
        tokenizer: the one of the tokenization.
        tokenization: what rows become.

    Raises:
        SimpoError: no row of a known shape, too many bad rows, or nothing that fits.
    """
    settings, label = tokenization.settings, tokenization.label
    fingerprint = _fingerprint(dataset, tokenizer, tokenization)
    dataset = dataset.with_format(None)
    _check_shapes(dataset, tokenization)
    mapped = dataset.map(
        tokenization,
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({**tokenization.columns, "where": _TEXT, "extra": _TEXT, _STATUS: List(_TEXT)}),
        num_proc=_processes(len(dataset), settings.num_proc),
        new_fingerprint=fingerprint,
        desc=f"Tokenizing {label}",
    )
    columns = mapped.select_columns(["where", _STATUS])[:]
    statuses = list(zip(columns["where"], columns[_STATUS], strict=True))
    report = DataReport.of(label, statuses, noun=tokenization.noun)
    report.check(settings.on_bad_row)
    if not report.used and all(found is None for found in mapped[next(iter(tokenization.columns))]):
        raise SimpoError(f"{label}: no row is left; dropped are {', '.join(report.dropped)}")
    if not report.used:
        raise SimpoError(f"{label}: {tokenization.nothing_fits(mapped)}")
    if report.used < report.rows:
        mapped = mapped.select([index for index, (_, entries) in enumerate(statuses) if is_used(entries)])
    return Prepared(mapped.remove_columns(_STATUS), report)


def already_tokenized(dataset: Dataset, label: str, noun: str) -> Prepared | None:
    """A data set that has ``prompt_ids`` and ``response_ids``, as it is; ``None`` for any other."""
    if not {"prompt_ids", "response_ids"} <= set(dataset.column_names):
        return None
    report = DataReport(label, rows=len(dataset), used=len(dataset), noun=noun)
    report.notices.append("already tokenized: taken as it is")
    return Prepared(dataset, report)


def shortest(mapped: Dataset, settings: TokenizeSettings, noun: str) -> str:
    """Why none of the mapped prompts with responses fits, in words."""
    lengths = [
        (len(prompt) + max(map(len, responses)), len(prompt))
        for prompt, responses in zip(mapped["prompt_ids"], mapped["response_ids"], strict=True)
        if responses
    ]
    total, prompt = min(lengths)
    return (
        f"no {noun} fits max_length {settings.max_length}: the shortest has {total} tokens, "
        f"its prompt {prompt} (the shortest prompt has {min(prompt for _, prompt in lengths)} tokens); "
        "raise max_length"
    )


def _bad(bad: BadRow) -> tuple[Mapping[str, Any], list[str]]:
    return {}, [f"{bad.kind}: {bad.reason}"]


def _check_unicode(texts: Sequence[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadRow("text that is not Unicode (half of a surrogate pair)") from error


def _check_shapes(dataset: Dataset, tokenization: Tokenization) -> None:
    """Fail before the work if none of the first rows is of a known shape.

    Raises:
        SimpoError: so it is; names the columns found.
    """
    label = tokenization.label
    head = range(min(len(dataset), _ROWS_LOOKED_AT))
    unknown = None
    for row, where in rows_of(dataset[: len(head)], head, label):
        try:
            read, _ = tokenization.canonical(row)
            tokenization.read(read, where)
            return
        except UnknownShape as error:
            reason = error.reason.replace(f"columns {columns_of(read)}", f"columns {columns_of(row)}")
            unknown = unknown or f"{where}: {reason}"
        except BadRow:
            return
    raise SimpoError(
        f"{label}: no row of a recognized shape ({unknown}); accepted are {tokenization.shapes}; also {FOREIGN_SHAPES}"
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


def _fingerprint(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> str:
    """Key of the cache: everything that the ids and statuses depend on."""
    parts = [
        _FORMAT,
        tokenization.noun,
        dataset._fingerprint,
        None if WHERE in dataset.column_names else tokenization.label,
        tokenization.options(),
        _tokenizer_state(tokenizer),
    ]
    # Half a digest: datasets appends the process number and allows 64 characters in all.
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer does to a text; padding and truncation, which calls switch on and off, excepted."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["padding"], backend["truncation"]
    return {
        "backend": backend,
        "template": tokenizer.chat_template,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
