"""Reads prompts for sampling from any dataset, as text or as token ids to generate from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.formats import PROMPT_SHAPES, Comparison, read_prompt, suspicions
from simpo.data.images import DIGESTS, IMAGES, ImageReader, Reference, split_processor
from simpo.data.messages import IMAGE, IMAGE_IN_TEXT, Context, Message
from simpo.data.rendering import Rendered
from simpo.data.rows import BadRow, DataReport, check_dataset, check_unicode, rows_of, undecoded
from simpo.data.settings import RenderSettings, TokenizeSettings
from simpo.data.shapes import canonical, check_not_rendered
from simpo.data.tokenizing import TOKENS, Comparisons, tokenize
from simpo.errors import SimpoError
from simpo.runs.results import fingerprint

REPEATED = "repeated prompt"
OVERLONG_PROMPT = "longer than max_prompt_length"


@dataclass(frozen=True)
class PlainPrompt:
    """A prompt for a model whose tokenizer is not available here."""

    # First 16 hex digits of the SHA-256 of the content's JSON (sorted keys, no whitespace, UTF-8). If the prompt has
    # tools, variables for the chat template or images, the JSON is an object with all of these, where each image is
    # represented by its SHA-256.
    id: str
    content: str | list[Message]  # text, or messages, with the text `<image>` for an image
    where: str  # where the row comes from, e.g. `"train.jsonl:12"`
    extra: dict[str, Any]  # the row's other columns
    context: Context = field(default_factory=Context, kw_only=True)  # tools and variables for the chat template


@dataclass(frozen=True)
class Prompt(PlainPrompt):
    """A prompt as token ids."""

    ids: list[int]  # input to generation; never empty, with one BOS if the model has one
    # The images whose tokens are among the ids, as stored in the column IMAGES.
    images: Sequence[Reference] = field(default=(), kw_only=True)
    digests: Sequence[str] = field(default=(), kw_only=True)  # the SHA-256 of each


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts in the order of the data, and what happened to every row."""

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
    image_folder: str | None = None,
) -> Prompts:
    """Tokenize the prompts of a dataset; only the first occurrence of a repeated prompt is kept.

    Args:
        dataset: rows from :func:`simpo.data.sources.load_rows`, or any dataset with the same columns: comparisons,
            conversations (up to the last message that asks for an answer), or prompts.
        tokenizer: a fast tokenizer, or for rows with images a processor with one. If it has a chat template, everything
            is rendered with it.
        label: name of the dataset in the report and in messages.
        max_prompt_length: in tokens; longer prompts are dropped, never truncated.
        rendering: how conversations are rendered.
        image_folder: base folder of relative image paths; the working directory if None.

    Raises:
        SimpoError: as for :func:`simpo.data.tokenizing.prepare`, or ``max_prompt_length`` leaves no room for a prompt.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise SimpoError(f"max_prompt_length: {max_prompt_length} leaves no room for a prompt")
    check_dataset(dataset, label)
    tokenizer, reader = split_processor(tokenizer, image_folder)
    tokenization = _Prompts(tokenizer, label, max_prompt_length, rendering, reader)
    prepared = tokenize(undecoded(dataset), tokenizer, tokenization)
    distinct: dict[str, Prompt] = {}
    for row in prepared.dataset:
        content, extra = json.loads(row["content"]), json.loads(row["extra"])
        context, digests = Context(**json.loads(row["context"])), row.get(DIGESTS) or ()
        identity, images = prompt_id(content, context, digests), row.get(IMAGES) or ()
        prompt = Prompt(
            identity, content, row["where"], extra, row["ids"], context=context, images=images, digests=digests
        )
        if distinct.setdefault(prompt.id, prompt) is not prompt:
            prepared.report.drop(REPEATED, prompt.where)
    return Prompts(tuple(distinct.values()), prepared.report)


def prompt_id(
    content: str | list[Message],
    context: Context = Context(),  # noqa: B008 - frozen
    digests: Sequence[str] = (),
) -> str:
    """Return the id of a prompt (see :class:`PlainPrompt`); ``digests`` are those of its images."""
    return hashlib.sha256(_canonical_json(content, context, digests).encode()).hexdigest()[:16]


def _canonical_json(content: str | list[Message], context: Context, digests: Sequence[str] = ()) -> str:
    columns = context.columns | ({DIGESTS: list(digests)} if digests else {})
    value = {"prompt": content, **columns} if columns else content
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def read_prompts(dataset: Dataset) -> tuple[list[PlainPrompt], DataReport]:
    """Read prompts like :func:`prepare_prompts`, but without a tokenizer.

    Returns the distinct prompts and the report on all rows.
    """
    check_dataset(dataset, "prompts")
    distinct: dict[str, PlainPrompt] = {}

    def statuses() -> Iterator[tuple[str, list[str]]]:
        for given, where in rows_of(dataset[:], range(len(dataset)), "prompts"):
            try:
                row, read = canonical(given, answers=False)
                check_not_rendered(row)
                content = read_prompt(row, where)
                if not content.prompt:
                    raise BadRow("empty prompt")
                check_unicode(_canonical_json(content.prompt, content.context))
                identity = prompt_id(content.prompt, content.context)
                prompt = PlainPrompt(identity, content.prompt, where, content.extra, context=content.context)
            except BadRow as error:
                yield where, [error.entry]
            else:
                repeated = distinct.setdefault(prompt.id, prompt) is not prompt
                entries = [*([f"read: {read}"] if read else []), *suspicions(row, content)]
                yield where, [*entries, *([f"dropped: {REPEATED}"] if repeated else [])]

    report = DataReport.of("prompts", statuses(), noun="prompts")
    report.check("skip")
    return list(distinct.values()), report


def columns_identity(prompts: Iterable[PlainPrompt]) -> dict[str, str]:
    """Return what the prompts' other columns add to a run's identity: their digest, or nothing if there are none."""
    columns = [prompt.extra for prompt in prompts]
    return {"columns": fingerprint(columns)} if any(columns) else {}


class _Prompts(Comparisons):
    """Turns a row into a prompt."""

    columns: ClassVar = {"ids": TOKENS, "content": Value("string"), "context": Value("string")}
    noun = "prompts"
    shapes = PROMPT_SHAPES
    answers = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        label: str,
        limit: int | None,
        rendering: RenderSettings | None,
        images: ImageReader | None,
    ) -> None:
        super().__init__(tokenizer, TokenizeSettings(rendering=rendering or RenderSettings()), label, images)
        self._limit = limit

    def read(self, row: Mapping[str, Any], where: str) -> Comparison:
        return read_prompt(row, where, self.renderer.roles, images=self.images is not None)

    def values(self, content: Comparison) -> Mapping[str, Any]:
        context, prompt = {"tools": content.context.tools, "kwargs": content.context.kwargs}, content.prompt
        if content.context.images and not isinstance(prompt, str):
            contents = [(message["content"] or "").replace(IMAGE, IMAGE_IN_TEXT) for message in prompt]
            prompt = [{**message, "content": text} for message, text in zip(prompt, contents, strict=True)]
        return {"content": json.dumps(prompt), "context": json.dumps(context)}

    def finish(
        self, rendered: Rendered, prompt: list[int], ids: list[list[int]]
    ) -> tuple[Mapping[str, Any], list[str]]:
        overlong = self._limit is not None and len(prompt) > self._limit
        return {"ids": prompt}, [f"dropped: {OVERLONG_PROMPT}"] if overlong else []

    def explain_all_dropped(self, mapped: Dataset) -> str:
        least = min(len(ids) for ids in mapped["ids"] if ids)
        return f"no prompt fits max_prompt_length {self._limit}: the shortest has {least} tokens; raise it"

    def options(self) -> dict[str, Any]:
        return {**super().options(), "max_prompt_length": self._limit}
