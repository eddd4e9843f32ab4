"""Prompts for sampling: read from any data set, each as the ids that generation is fed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.conversations import read_conversation
from simpo.data.formats import SHAPES, Comparison, is_comparison, recognise
from simpo.data.mapping import TOKENS, Draft, Tokenization, check_bad, check_rows, prepare_rows
from simpo.data.messages import ASKING, Message, kind_of, read_messages
from simpo.data.rendered import check_not_rendered
from simpo.data.report import DataReport
from simpo.data.rows import BadRow, UnknownShape, columns_of, other_columns, rows_of
from simpo.data.settings import TokenizeSettings
from simpo.data.shapes import canonical
from simpo.data.templates import Rendered
from simpo.errors import SimpoError

REPEATED = "repeated prompt"
OVERLONG_PROMPT = "longer than max_prompt_length"


@dataclass(frozen=True)
class PlainPrompt:
    """A prompt to be answered, for a model whose tokenizer is not here.

    Attributes:
        id: the first 16 hexadecimal digits of the SHA-256 of the content's JSON (keys sorted, no white space, UTF-8).
        content: text, or messages.
        where: where the row comes from, e.g. ``"train.jsonl:12"``.
        extra: the row's other columns.
    """

    id: str
    content: str | list[Message]
    where: str
    extra: dict[str, Any]


@dataclass(frozen=True)
class Prompt(PlainPrompt):
    """A prompt as token ids.

    Attributes:
        ids: what generation is fed; never empty, with one BOS where the model has one.
    """

    ids: list[int]


@dataclass(frozen=True)
class Prompts:
    """Different prompts in the order of the data, and what became of every row."""

    prompts: tuple[Prompt, ...]
    report: DataReport

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


def prepare_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    label: str = "prompts",
    max_prompt_length: int | None = None,
) -> Prompts:
    """Read the prompts of a data set; a repeated one is kept where it occurs first.

    Args:
        dataset: rows as :func:`simpo.data.sources.load_rows` gives them, or any data set with the same columns:
            comparisons, conversations (up to the last message that asks for an answer), or prompts.
        tokenizer: a fast tokenizer. If it has a chat template, everything is rendered with it.
        label: names the data set in the report and in messages.
        max_prompt_length: tokens; a longer prompt is dropped, never cut.

    Raises:
        SimpoError: no row of a known shape, too many bad rows, nothing that fits, or a tokenizer or chat
            template that cannot serve.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise SimpoError(f"max_prompt_length: {max_prompt_length} leaves no room for a prompt")
    check_rows(dataset, label)
    prepared = prepare_rows(dataset, tokenizer, _Prompts(tokenizer, label, max_prompt_length))
    found: dict[str, Prompt] = {}
    for row in prepared.dataset:
        content = json.loads(row["content"])
        prompt = Prompt(prompt_id(content), content, row["where"], json.loads(row["extra"]), row["ids"])
        if found.setdefault(prompt.id, prompt) is not prompt:
            prepared.report.drop(REPEATED, prompt.where)
    return Prompts(tuple(found.values()), prepared.report)


def read_prompts(dataset: Dataset, *, label: str = "prompts") -> tuple[list[PlainPrompt], DataReport]:
    """As :func:`prepare_prompts`, without a tokenizer: different prompts, and what became of every row.

    Raises:
        SimpoError: no rows, or too many that are no prompts.
    """
    check_rows(dataset, label)
    found: dict[str, PlainPrompt] = {}
    statuses: list[tuple[str, list[str]]] = []
    for given, where in rows_of(dataset[:], range(len(dataset)), label):
        try:
            row, read = canonical(given, answers=False)
            check_not_rendered(row)
            content, extra = recognise_prompt(row, where)
            if not content:
                raise BadRow("empty prompt")
            prompt = PlainPrompt(prompt_id(content), content, where, extra)
        except BadRow as error:
            statuses.append((where, [f"{error.kind}: {error.reason}"]))
            continue
        except UnicodeEncodeError:
            statuses.append((where, ["bad: text that is not Unicode (half of a surrogate pair)"]))
            continue
        known = found.setdefault(prompt.id, prompt)
        noted = [f"read: {read}"] if read else []
        statuses.append((where, noted if known is prompt else [*noted, f"dropped: {REPEATED}"]))
    report = DataReport.of(label, statuses, noun=_Prompts.noun)
    check_bad(report, statuses, TokenizeSettings())
    return list(found.values()), report


def recognise_prompt(row: Mapping[str, Any], where: str) -> tuple[str | list[Message], dict[str, Any]]:
    """The prompt of a canonical row (:mod:`simpo.data.shapes`), and the columns that were not read for it.

    Columns of a comparison count first, then ``messages`` and ``prompt``.

    Raises:
        UnknownShape: its columns are of no known shape.
        BadRow: its columns are, but their values are not.
    """
    check_prompt_shape(row)
    if is_comparison(row):
        columns = (
            ("prompt", "chosen", "rejected")
            if {"chosen", "rejected"} <= set(row)
            else ("prompt", "responses", "scores")
        )
        return recognise(row, where).prompt, other_columns(row, *columns)
    if "messages" in row:
        return _asked(read_conversation(row["messages"])), other_columns(row, "messages")
    value = row["prompt"]
    if isinstance(value, list):
        value = read_messages(value, "prompt")
        if value[-1]["role"] not in ASKING:
            raise BadRow("the prompt does not end with a user message")
    elif not isinstance(value, str):
        raise BadRow(f"prompt is {kind_of(value)}, not text or messages")
    return value, other_columns(row, "prompt")


def check_prompt_shape(row: Mapping[str, Any]) -> None:
    """Look at a row's column names only.

    Raises:
        UnknownShape: they are of no known shape.
    """
    if not is_comparison(row) and not {"messages", "prompt"} & set(row):
        raise UnknownShape(f"no recognised shape: columns {columns_of(row)}")


def _asked(messages: list[Message]) -> list[Message]:
    """A conversation up to the last message that asks for an answer."""
    asking = [i for i, message in enumerate(messages) if message["role"] in ASKING]
    if not asking:
        raise BadRow("no user's message")
    return messages[: asking[-1] + 1]


class _Prompts(Tokenization[Rendered]):
    """A row becomes a prompt."""

    columns: ClassVar = {"ids": TOKENS, "content": Value("string")}
    noun = "prompts"
    shapes = f"{SHAPES}, {{messages}}, {{prompt}} (a string or messages)"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, label: str, limit: int | None) -> None:
        super().__init__(tokenizer, TokenizeSettings(), label)
        self._limit = limit

    def canonical(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
        return canonical(row, answers=False)

    def check_shape(self, row: Mapping[str, Any]) -> None:
        check_prompt_shape(row)

    def draft(self, row: Mapping[str, Any], where: str) -> Draft[Rendered]:
        content, extra = recognise_prompt(row, where)
        return Draft(self.renderer.render(Comparison(content, (), where)), extra, {"content": json.dumps(content)})

    def outcome(self, rendered: Rendered, ids: list[list[int]]) -> tuple[Mapping[str, Any], list[str]]:
        """Ids with BOS, and whether they are within the limit."""
        prompt = self.encoder.one_bos(ids[0])
        if not prompt:
            raise BadRow("empty prompt")
        overlong = self._limit is not None and len(prompt) > self._limit
        return {"ids": prompt}, [f"dropped: {OVERLONG_PROMPT}"] if overlong else []

    def nothing_fits(self, mapped: Dataset) -> str:
        least = min(len(ids) for ids in mapped["ids"] if ids)
        return f"no prompt fits max_prompt_length {self._limit}: the shortest has {least} tokens; raise it"

    def options(self) -> dict[str, Any]:
        return {**super().options(), "max_prompt_length": self._limit}


def prompt_id(content: str | list[Message]) -> str:
    """The id of a prompt's content; see :class:`Prompt`."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
