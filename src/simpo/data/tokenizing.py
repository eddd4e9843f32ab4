"""Tokenizes datasets of comparisons, judged responses and conversations.

:class:`Tokenization` takes a row from known columns to content, to text, and to ids within the limits. Everything that
happens to a row on the way is reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import end_of_turn, user_turn_frame
from simpo.data.encoding import Encoder
from simpo.data.formats import (
    COMPARISON_SHAPES,
    CONVERSATION_SHAPES,
    FEEDBACK_SHAPES,
    Comparison,
    Conversation,
    is_comparison,
    read_comparison,
    read_conversation,
    read_feedback,
    suspicions,
)
from simpo.data.images import COLUMNS, IMAGES, ImageReader, split_processor
from simpo.data.rendering import Rendered, RenderedTurns, Renderer
from simpo.data.rows import (
    PART,
    WHERE,
    BadRow,
    DataReport,
    UnknownShape,
    as_json,
    check_dataset,
    check_unicode,
    columns_of,
    is_used,
    rows_of,
    undecoded,
)
from simpo.data.settings import PROMPT_CUT, TURNS_CUT, TokenizeSettings, truncate, truncate_turns
from simpo.data.shapes import FOREIGN_SHAPES, canonical, check_not_rendered, first_canonical
from simpo.data.verification import cached, check_tokenized, map_cache_file
from simpo.errors import SimpoError

TOKENS = List(Value("int32"))
OVERLONG_WITH_IMAGES = "longer than max_length, and rows with images are never cut"
NO_PROCESSOR = (
    "the row has images, but there is no processor; use simpo train, sft or reward, or pass one as processing_class"
)
UNANSWERED_CUT = "messages after the last answer"
_STATUS = "_status"
# Part of every fingerprint: increase it when the same rows and settings yield different ids or statuses than before.
_FORMAT = 18
_BATCH = 256
_ROWS_CHECKED = 1000  # rows checked for a known shape before tokenizing starts
# Tokenizing fewer rows than this is faster than starting processes.
_MIN_ROWS_FOR_WORKERS = 2000
_ROWS_PER_PROCESS = 1000


@dataclass(frozen=True)
class Prepared:
    """A tokenized dataset."""

    # Columns `prompt_ids` (list of int32, never empty), `response_ids` (list of lists of int32, best first), `where`
    # and `extra` (JSON object with the row's other columns); with a processor, `images` and `image_digests` (COLUMNS).
    # Conversations for supervised fine-tuning also have `scored` (list of lists of bool, same lengths as
    # `response_ids`), K-wise comparisons `scores` (list of float, descending) and single responses `label` (bool).
    dataset: Dataset
    report: DataReport  # what happened to every row


def prepare(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, *, label: str = "train"
) -> Prepared:
    """Tokenize a dataset of comparisons; the result is cached alongside the dataset.

    K-wise rows have ``scores`` in descending order; a dataset that contains only pairs has no such column.

    Args:
        dataset: rows from :func:`simpo.data.sources.load_rows`, or any dataset with the same columns. A dataset that
            already has ``prompt_ids`` and ``response_ids`` is returned unchanged.
        tokenizer: a fast tokenizer, or for rows with images a processor with one. If it has a chat template, everything
            is rendered with it.
        settings: lengths, truncation and how to treat bad rows.
        label: name of the dataset in the report and in messages.

    Raises:
        SimpoError: no row has a known shape, too many rows are bad, no row fits, or the tokenizer or its chat template
            cannot be used.
    """
    prepared = _prepare(Comparisons, dataset, tokenizer, settings, label)
    if "prompt_ids" in dataset.column_names:
        return prepared
    if prepared.dataset.with_format("arrow")["scores"].null_count == len(prepared.dataset):
        prepared = replace(prepared, dataset=prepared.dataset.remove_columns("scores"))
    if settings.truncation == "paper":
        prepared.report.notices.append(
            "truncation: paper cuts both responses of an overlong comparison to "
            f"{settings.max_length - settings.prompt_limit} tokens; truncated responses have no end-of-turn token"
        )
    return prepared


def prepare_feedback(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, *, label: str = "train"
) -> Prepared:
    """Tokenize single labeled responses like :func:`prepare`, with the additional column ``label``."""
    prepared = _prepare(_Feedback, dataset, tokenizer, settings, label)
    labels = pc.unique(prepared.dataset.with_format("arrow")["label"]).to_pylist()
    if len(labels) < 2:
        raise SimpoError(
            f"{label}: every row has the label {str(labels[0]).lower()}; both desirable (true) and undesirable (false) "
            "responses are needed"
        )
    return prepared


def prepare_sft(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, *, label: str = "train"
) -> Prepared:
    """Tokenize a dataset of conversations like :func:`prepare`, with the additional column ``scored``.

    A conversation becomes one prompt, the input to generation of its first answer, and one response, everything after
    it up to the end of the last answer. ``scored`` marks the tokens of the answers and their end-of-turn tokens.
    """
    if settings.truncation == "paper":
        raise SimpoError("truncation: 'paper' is for comparisons, not for supervised fine-tuning; set prompt or drop")
    if settings.paper_tokenization:
        raise SimpoError("paper_tokenization: for comparisons, not for supervised fine-tuning; remove this key")
    prepared = _prepare(Conversations, dataset, tokenizer, settings, label)
    most = pc.max(pc.list_value_length(prepared.dataset.with_format("arrow")["response_ids"])).as_py()
    if most != 1:
        raise SimpoError(f"{label}: tokenized comparisons (up to {most} responses), not conversations; use simpo train")
    return prepared


def is_feedback(dataset: Dataset) -> bool:
    """Whether a dataset, tokenized or not, holds unpaired feedback, judging by its columns or first readable row."""
    if "prompt_ids" in dataset.column_names or not len(dataset):
        return "label" in dataset.column_names
    row = first_canonical(dataset)
    return {"prompt", "completion", "label"} <= set(row) and not is_comparison(row)


def end_token_id(tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> int:
    """Return the token that ends every response: the template's end-of-turn token, or EOS as in the paper's code."""
    if not settings.paper_tokenization:
        return end_of_turn(tokenizer).token_id
    if tokenizer.eos_token_id is None:
        raise SimpoError("paper_tokenization: the tokenizer has no EOS; set an eos_token")
    return tokenizer.eos_token_id


# ---- Tokenizing one row.


@dataclass(frozen=True)
class _Draft:
    """A sequence before encoding: text (None for a bad row), values of columns that need no ids, status entries."""

    rendered: Rendered | None
    values: Mapping[str, Any]
    status: list[str]


class Tokenization(ABC):
    """A callable for ``Dataset.map`` that tokenizes batches of rows; subclasses define what a row becomes.

    Attributes:
        columns: name -> type of the columns it returns, in addition to ``where`` and ``extra``.
        noun: what rows become, in the plural.
        shapes: the accepted row shapes, for messages.
        answers: whether to read the answers of rows from other tools as well.
    """

    columns: ClassVar[Mapping[str, Any]]
    noun: ClassVar[str]
    shapes: ClassVar[str]
    answers: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: TokenizeSettings,
        label: str,
        images: ImageReader | None = None,
    ) -> None:
        self.settings, self.label, self.images = settings, label, images
        self.bos, self.end = tokenizer.bos_token_id, end_token_id(tokenizer, settings)
        self.encoder = Encoder(tokenizer)
        self._has_template = tokenizer.chat_template is not None
        self._frame = user_turn_frame(tokenizer) if self._has_template else None
        self.renderer = Renderer(
            tokenizer,
            self.encoder.literal,
            settings.rendering,
            paper=settings.paper_tokenization,
            insert_system=settings.auto_insert_empty_system_msg,
        )

    @abstractmethod
    def read(self, row: Mapping[str, Any], where: str) -> Any:
        """Read the content of a row, with its other columns as ``extra``; raises :class:`BadRow`."""

    @abstractmethod
    def render(self, content: Any) -> Sequence[Rendered]:
        """Return the text of each sequence that the content becomes; raises :class:`BadRow`."""

    def values(self, content: Any) -> Mapping[str, Any]:
        """Return the values of columns that need no ids."""
        return {}

    @abstractmethod
    def finish(self, rendered: Any, prompt: list[int], ids: list[list[int]]) -> tuple[Mapping[str, Any], list[str]]:
        """Return the values of columns that need ids, and status entries; raises :class:`BadRow`.

        ``ids`` holds the ids of each rendered text; ``prompt`` is the first, with one leading BOS if the model has one.
        """

    def explain_all_dropped(self, mapped: Dataset) -> str:
        """Explain that every row is too long."""
        lengths = [
            (len(prompt) + max(map(len, responses)), len(prompt))
            for prompt, responses in zip(mapped["prompt_ids"], mapped["response_ids"], strict=True)
            if responses
        ]
        total, prompt = min(lengths)
        return (
            f"no row fits max_length {self.settings.max_length}: the shortest has {total} tokens, "
            f"its prompt {prompt} (the shortest prompt has {min(prompt for _, prompt in lengths)} tokens); "
            "raise max_length"
        )

    def options(self) -> dict[str, Any]:
        """Return the options that the result depends on, besides the rows and the tokenizer."""
        options = dataclasses.asdict(self.settings)
        del options["on_bad_row"], options["num_proc"]  # do not affect the result
        return options

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Tokenize a batch of rows and return its columns."""
        rows = rows_of(batch, indices, self.label)
        drafts = [draft for row, where in rows for draft in self._draft_row(row, where)]
        rendered = [draft.rendered for draft in drafts if draft.rendered is not None]
        all_ids = iter(self.encoder.encode_groups([(sequence.texts, sequence.marker) for sequence in rendered]))
        columns: dict[str, list[Any]] = {name: [] for name in self.features}
        for draft in drafts:
            values, status = draft.values, draft.status
            if draft.rendered is not None:
                ids = next(all_ids)
                try:
                    if not (prompt := self.encoder.with_one_bos(ids[0])):
                        raise BadRow("empty prompt")
                    finished, outcome = self.finish(draft.rendered, prompt, ids)
                except BadRow as bad:
                    finished, outcome = {}, [bad.entry]
                if values.get(IMAGES) and not {f"cut: {PROMPT_CUT}", f"cut: {TURNS_CUT}"}.isdisjoint(outcome):
                    outcome = [f"dropped: {OVERLONG_WITH_IMAGES}"]
                if not is_used(outcome):
                    status = [entry for entry in status if entry == PART or entry.startswith("split: ")]
                values, status = {**values, **finished}, [*status, *outcome]
            for name, column in columns.items():
                column.append(status if name == _STATUS else values.get(name))
        return columns

    def _draft_row(self, row: Mapping[str, Any], where: str) -> list[_Draft]:
        try:
            row, read = canonical(row, answers=self.answers)
            if self._has_template:
                check_not_rendered(row, self._frame)
            content = self.read(row, where)
            if (images := content.context.images) and self.images is None:
                raise BadRow(NO_PROCESSOR)
            texts = self.render(content)
            for rendered in texts:
                check_unicode("".join(rendered.texts))
            with_images = self.images.insert_images(texts, images) if self.images else [(text, {}) for text in texts]
        except BadRow as bad:
            return [_Draft(None, {"where": where, "extra": "{}"}, [bad.entry])]
        values = {**self.values(content), "where": where, "extra": as_json(content.extra)}
        drafts = [_Draft(rendered, {**values, **columns}, list(rendered.status)) for rendered, columns in with_images]
        # Reported once per row.
        drafts[0].status[:0] = [*([f"read: {read}"] if read else []), *suspicions(row, content, self.renderer.options)]
        return drafts

    @property
    def features(self) -> Features:
        """The columns of the result."""
        text, images = Value("string"), {} if self.images is None else COLUMNS
        return Features({**self.columns, **images, "where": text, "extra": text, _STATUS: List(text)})


class Comparisons(Tokenization):
    """Turns a row into a prompt and its responses."""

    columns: ClassVar = {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "scores": List(Value("float64"))}
    noun = "comparisons"
    shapes = f"{COMPARISON_SHAPES}; for objectives kto and bco also {{prompt, completion, label}}"

    def read(self, row: Mapping[str, Any], where: str) -> Comparison:  # noqa: D102
        return read_comparison(row, where, self.renderer.roles)

    def render(self, content: Comparison) -> list[Rendered]:  # noqa: D102
        return [self.renderer.render(content)]

    def values(self, content: Comparison) -> Mapping[str, Any]:  # noqa: D102
        return {"scores": content.scores, "label": content.label}

    def finish(  # noqa: D102
        self, rendered: Rendered, prompt: list[int], ids: list[list[int]]
    ) -> tuple[Mapping[str, Any], list[str]]:
        responses = []
        for answer, whole in zip(rendered.answers, ids[1:], strict=True):
            response = self.encoder.encode_following(ids[0], answer.text, whole, rendered.marker)
            end = self.end if self.settings.paper_tokenization else answer.end.token_id
            responses.append(response if response[-1:] == [end] else [*response, end])
        if len(set(map(tuple, responses))) < len(responses):
            raise BadRow("identical responses")
        prompt, responses, status = truncate(prompt, responses, self.settings, self.bos)
        return {"prompt_ids": prompt, "response_ids": responses}, status


class _Feedback(Comparisons):
    """Turns a row into a prompt, one response and a label."""

    columns: ClassVar = {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "label": Value("bool")}
    noun = "judged responses"
    shapes = FEEDBACK_SHAPES

    def read(self, row: Mapping[str, Any], where: str) -> Comparison:
        return read_feedback(row, where, self.renderer.roles)


class Conversations(Tokenization):
    """Turns a row into a prompt and one response; only the answers within it are scored."""

    columns: ClassVar = {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "scored": List(List(Value("bool")))}
    noun = "conversations"
    shapes = CONVERSATION_SHAPES

    def read(self, row: Mapping[str, Any], where: str) -> Conversation:  # noqa: D102
        return read_conversation(row, where, self.renderer.roles)

    def render(self, content: Conversation) -> list[RenderedTurns]:  # noqa: D102
        sequences = self.renderer.render_turns(content)
        if content.unanswered:
            sequences[0] = replace(sequences[0], status=(f"cut: {UNANSWERED_CUT}", *sequences[0].status))
        return sequences

    def finish(
        self, rendered: RenderedTurns, prompt: list[int], ids: list[list[int]]
    ) -> tuple[Mapping[str, Any], list[str]]:
        """Return ids within the limits, and which of them are scored.

        The ids of an answer are what generation should produce after its prompt; the ids after it are taken from the
        prompt of the next answer.
        """
        response: list[int] = []
        scored: list[bool] = []
        ends: list[int] = []
        between = rendered.between
        for k, answer in enumerate(rendered.answers):
            whole, end = ids[k + 1], len(ids[k + 1])
            if k < len(between):
                # The end-of-turn token of this answer, not of a user turn before the next answer.
                positions = [i for i, token_id in enumerate(whole) if token_id == answer.end.token_id]
                end = positions[-1 - between[k].count(answer.end.text)]
            answer_ids = self.encoder.encode_following(ids[k], answer.text, whole[:end], rendered.marker)
            rest = whole[end + 1 :]
            response += [*answer_ids, answer.end.token_id, *rest]
            scored += [True] * (len(answer_ids) + 1) + [False] * len(rest)
            ends.append(len(response) - len(rest))
        prompt, (kept,), status = truncate_turns(prompt, response, ends, self.settings, self.bos)
        return {"prompt_ids": prompt, "response_ids": [kept], "scored": [scored[: len(kept)]]}, status


# ---- Tokenizing a whole dataset.


def _prepare(
    kind: type[Tokenization],
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings,
    label: str,
) -> Prepared:
    """Tokenize a dataset, unless it already has ``prompt_ids`` and ``response_ids``."""
    check_dataset(dataset, label)
    if not {"prompt_ids", "response_ids"} <= set(dataset.column_names):
        tokenizer, images = split_processor(tokenizer, settings.image_folder)
        return tokenize(undecoded(dataset), tokenizer, kind(tokenizer, settings, label, images))
    check_tokenized(dataset, label)
    report = DataReport(label, rows=len(dataset), used=len(dataset), noun=kind.noun)
    report.notices.append("already tokenized, used unchanged")
    return Prepared(dataset, report)


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> Prepared:
    """Tokenize a dataset that passed :func:`simpo.data.rows.check_dataset`; the result is cached alongside it.

    ``tokenization`` defines what the rows become.
    """
    settings, label = tokenization.settings, tokenization.label
    fingerprint = _fingerprint(dataset, tokenizer, tokenization)
    dataset = dataset.with_format(None)
    _check_shapes(dataset, tokenization)
    mapped = cached(
        lambda: dataset.map(
            tokenization,
            batched=True,
            batch_size=_BATCH,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=tokenization.features,
            num_proc=_process_count(len(dataset), settings.num_proc),
            new_fingerprint=fingerprint,
            cache_file_name=map_cache_file(fingerprint),
            desc=f"Tokenizing {label}",
        )
    )
    columns = mapped.select_columns(["where", _STATUS])[:]
    report = DataReport.of(label, zip(columns["where"], columns[_STATUS], strict=True), noun=tokenization.noun)
    report.notices += tokenization.renderer.notices
    report.check(settings.on_bad_row)
    if not report.used and all(value is None for value in mapped[next(iter(tokenization.columns))]):
        raise SimpoError(f"{label}: every row was dropped: {', '.join(report.dropped)}")
    if not report.used:
        raise SimpoError(f"{label}: {tokenization.explain_all_dropped(mapped)}")
    if report.used < report.rows:
        mapped = mapped.select([index for index, entries in enumerate(columns[_STATUS]) if is_used(entries)])
    return Prepared(mapped.remove_columns(_STATUS), report)


def _check_shapes(dataset: Dataset, tokenization: Tokenization) -> None:
    """Fail early, naming the columns found, if none of the first rows has a known shape."""
    label, unknown = tokenization.label, None
    head = range(min(len(dataset), _ROWS_CHECKED))
    for row, where in rows_of(dataset[: len(head)], head, label):
        try:
            read, _ = canonical(row, answers=tokenization.answers)
            tokenization.read(read, where)
            return
        except UnknownShape as error:
            reason = error.reason.replace(f"columns {columns_of(read)}", f"columns {columns_of(row)}")
            unknown = unknown or f"{where}: {reason}"
        except BadRow:
            return
    raise SimpoError(
        f"{label}: no row has a recognized shape ({unknown}); accepted are {tokenization.shapes}; also {FOREIGN_SHAPES}"
    )


def _process_count(rows: int, wanted: int | None) -> int | None:
    """Return the number of worker processes; ``None`` means this process."""
    if wanted is None:
        # macOS and Windows cannot report which cores a process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(cores, rows // _ROWS_PER_PROCESS)
    return wanted if rows >= _MIN_ROWS_FOR_WORKERS and wanted > 1 else None


def _fingerprint(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> str:
    """Return the cache key, which covers everything that ids and statuses depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["padding"], backend["truncation"]  # calls turn these on and off
    parts = [
        _FORMAT,
        tokenization.noun,
        dataset._fingerprint,
        None if WHERE in dataset.column_names else tokenization.label,
        tokenization.options(),
        backend,
        tokenizer.chat_template,
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        tokenization.images and tokenization.images.fingerprint(dataset),
    ]
    # Half a digest, because datasets appends the process number and allows 64 characters in total.
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
