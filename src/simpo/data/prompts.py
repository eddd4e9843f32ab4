"""Prompts for sampling: read from any data set, each as the ids that generation is fed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.context import CONTEXT_COLUMNS, Context, read_context
from simpo.data.formats import SHAPES, Comparison, is_comparison, read_conversation, recognise
from simpo.data.mapping import TOKENS, DataReport, Draft, Tokenization, check_bad, check_rows, prepare_rows
from simpo.data.messages import ASKING, Message, kind_of, read_messages, without_train
from simpo.data.rendered import check_not_rendered
from simpo.data.rows import BadRow, UnknownShape, columns_of, other_columns, rows_of
from simpo.data.settings import RenderSettings, TokenizeSettings
from simpo.data.shapes import canonical
from simpo.data.templates import Rendered
from simpo.errors import SimpoError

REPEATED = "repeated prompt"
OVERLONG_PROMPT = "longer than max_prompt_length"


@dataclass(frozen=True)
class PlainPrompt:
    """A prompt to be answered, for a model whose tokenizer is not here.

    Attributes:
        id: the first 16 hexadecimal digits of the SHA-256 of the content's JSON (keys sorted, no white space, UTF-8);
            if the prompt has tools or variables for the chat template, of the JSON of an object with all of them.
        content: text, or messages.
        where: where the row comes from, e.g. ``"train.jsonl:12"``.
        extra: the row's other columns.
        context: tools and variables for the chat template.
    """

    id: str
    content: str | list[Message]
    where: str
    extra: dict[str, Any]
    context: Context = field(default_factory=Context, kw_only=True)


@dataclass(frozen=True)
class Prompt(PlainPrompt):
    """A prompt as token ids.

    Attributes:
        ids: what generation is fed; never empty, with one BOS where the model has one.
    """

    ids: list[int]


@dataclass(frozen=True)
class Prompts:
    """Different prompts in the order of the data, and what happened to every row."""

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
    rendering: RenderSettings | None = None,
) -> Prompts:
    """Read the prompts of a data set; a repeated one is kept where it occurs first.

    Args:
        dataset: rows as :func:`simpo.data.sources.load_rows` gives them, or any data set with the same columns:
            comparisons, conversations (up to the last message that asks for an answer), or prompts.
        tokenizer: a fast tokenizer. If it has a chat template, everything is rendered with it.
        label: names the data set in the report and in messages.
        max_prompt_length: tokens; a longer prompt is dropped, never cut.
        rendering: how conversations are rendered.

    Raises:
        SimpoError: no row of a known shape, too many bad rows, nothing that fits, or a tokenizer or chat
            template that cannot serve.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise SimpoError(f"max_prompt_length: {max_prompt_length} leaves no room for a prompt")
    check_rows(dataset, label)
    prepared = prepare_rows(dataset, tokenizer, _Prompts(tokenizer, label, max_prompt_length, rendering))
    found: dict[str, Prompt] = {}
    for row in prepared.dataset:
        content = json.loads(row["content"])
        context = Context(**json.loads(row["context"]))
        extra = json.loads(row["extra"])
        prompt = Prompt(prompt_id(content, context), content, row["where"], extra, row["ids"], context=context)
        if found.setdefault(prompt.id, prompt) is not prompt:
            prepared.report.drop(REPEATED, prompt.where)
    return Prompts(tuple(found.values()), prepared.report)


def read_prompts(dataset: Dataset, *, label: str = "prompts") -> tuple[list[PlainPrompt], DataReport]:
    """As :func:`prepare_prompts`, without a tokenizer: different prompts, and what happened to every row.

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
            content, extra, context = recognise_prompt(row, where)
            if not content:
                raise BadRow("empty prompt")
            prompt = PlainPrompt(prompt_id(content, context), content, where, extra, context=context)
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


def recognise_prompt(row: Mapping[str, Any], where: str) -> tuple[str | list[Message], dict[str, Any], Context]:
    """The prompt of a canonical row (:mod:`simpo.data.shapes`), the columns not read for it, and its context.

    Columns of a comparison count first, then ``messages`` and ``prompt``.

    Raises:
        UnknownShape: its columns are of no known shape.
        BadRow: its columns are, but their values are not.
    """
    check_prompt_shape(row)
    if is_comparison(row):
        comparison = recognise(row, where)
        return comparison.prompt, comparison.extra, comparison.context
    name, value = _prompt_cell(row)
    content, _, context = read_context(row, value)
    return content, other_columns(row, name, *CONTEXT_COLUMNS), context


def _prompt_cell(row: Mapping[str, Any]) -> tuple[str, str | list[Message]]:
    """Name and content of the column that holds the prompt."""
    if "messages" in row:
        return "messages", without_train(_asked(read_conversation(row["messages"])))
    value = row["prompt"]
    if isinstance(value, list):
        value = without_train(read_messages(value, "prompt"))
        if value[-1]["role"] not in ASKING:
            raise BadRow("the prompt does not end with a user message")
    elif not isinstance(value, str):
        raise BadRow(f"prompt is {kind_of(value)}, not text or messages")
    return "prompt", value


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

    columns: ClassVar = {"ids": TOKENS, "content": Value("string"), "context": Value("string")}
    noun = "prompts"
    shapes = f"{SHAPES}, {{messages}}, {{prompt}} (a string or messages)"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, label: str, limit: int | None, rendering: RenderSettings | None
    ) -> None:
        super().__init__(tokenizer, TokenizeSettings(rendering=rendering or RenderSettings()), label)
        self._limit = limit

    def canonical(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
        return canonical(row, answers=False)

    def check_shape(self, row: Mapping[str, Any]) -> None:
        check_prompt_shape(row)

    def drafts(self, row: Mapping[str, Any], where: str) -> list[Draft[Rendered]]:
        content, extra, context = recognise_prompt(row, where)
        rendered = self.renderer.render(Comparison(content, (), where, context=context))
        values = {
            "content": json.dumps(content),
            "context": json.dumps({"tools": context.tools, "kwargs": context.kwargs}),
        }
        return [Draft(rendered, extra, values)]

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


def prompt_id(content: str | list[Message], context: Context = Context()) -> str:  # noqa: B008 - frozen
    """The id of a prompt; see :class:`PlainPrompt`."""
    value = {"prompt": content, **context.columns} if context.columns else content
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
