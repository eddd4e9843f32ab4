"""Prompts for sampling: read from any data set, each as the ids that generation is fed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.formats import PROMPT_SHAPES, REPEATED, Comparison, PlainPrompt, prompt_id, read_prompt
from simpo.data.mapping import TOKENS, Draft, Tokenization, prepare_rows
from simpo.data.messages import Context, Message
from simpo.data.rows import BadRow, DataReport, check_dataset
from simpo.data.settings import RenderSettings, TokenizeSettings
from simpo.data.shapes import canonical
from simpo.data.templates import Rendered
from simpo.errors import SimpoError

OVERLONG_PROMPT = "longer than max_prompt_length"


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
    check_dataset(dataset, label)
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


class _Prompts(Tokenization[Rendered]):
    """A row becomes a prompt."""

    columns: ClassVar = {"ids": TOKENS, "content": Value("string"), "context": Value("string")}
    noun = "prompts"
    shapes = PROMPT_SHAPES

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, label: str, limit: int | None, rendering: RenderSettings | None
    ) -> None:
        super().__init__(tokenizer, TokenizeSettings(rendering=rendering or RenderSettings()), label)
        self._limit = limit

    def canonical(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
        return canonical(row, answers=False)

    def read(self, row: Mapping[str, Any], where: str) -> tuple[str | list[Message], dict[str, Any], Context]:
        return read_prompt(row, where)

    def drafts(self, row: Mapping[str, Any], where: str) -> list[Draft[Rendered]]:
        content, extra, context = self.read(row, where)
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
