"""Comparisons, single judged responses and conversations to token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import pyarrow.compute as pc
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

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
)
from simpo.data.mapping import (
    TOKENS,
    Draft,
    Prepared,
    Tokenization,
    already_tokenized,
    prepare_rows,
    shortest,
)
from simpo.data.rows import BadRow, check_dataset
from simpo.data.settings import TokenizeSettings, fit, fit_turns
from simpo.data.shapes import first_canonical
from simpo.data.templates import EndOfTurn, Rendered, RenderedTurns, end_of_turn
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
    check_dataset(dataset, label)
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
    shapes = f"{COMPARISON_SHAPES}; for objective kto also {{prompt, completion, label}}"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, label: str) -> None:
        super().__init__(tokenizer, settings, label)
        self._end = end_token_id(tokenizer, settings)

    def read(self, row: Mapping[str, Any], where: str) -> Comparison:  # noqa: D102
        return read_comparison(row, where)

    def drafts(self, row: Mapping[str, Any], where: str) -> list[Draft[Rendered]]:  # noqa: D102
        comparison = self.read(row, where)
        return [
            Draft(
                self.renderer.render(comparison),
                comparison.extra,
                {"scores": comparison.scores, "label": comparison.label},
            )
        ]

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


# ---- Unpaired feedback: single responses with a label, desirable or not, to token ids.


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
    check_dataset(dataset, label)
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


class _Feedback(Comparisons):
    """A row becomes a prompt, one response and a label."""

    columns: ClassVar = {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "label": Value("bool")}
    noun = "judged responses"
    shapes = FEEDBACK_SHAPES

    def read(self, row: Mapping[str, Any], where: str) -> Comparison:
        return read_feedback(row, where)


# ---- Conversations to token ids for supervised fine-tuning: the assistant's turns are scored, nothing else
# is.


UNANSWERED_CUT = "messages after the last answer"


def prepare_sft(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings, *, label: str = "train"
) -> Prepared:
    """Tokenize a data set of conversations; the result is cached with the data set.

    A conversation is one prompt, what generation would be fed for its first answer, and one response, all the rest up
    to the end of its last answer. The column ``scored`` marks the tokens of the answers, with their end-of-turn tokens.

    Args:
        dataset: rows as :func:`simpo.data.sources.load_rows` gives them, or any data set with the same
            columns. One that has ``prompt_ids`` and ``response_ids`` is returned as it is.
        tokenizer: a fast tokenizer. If it has a chat template, everything is rendered with it.
        settings: lengths, truncation and how to treat bad rows.
        label: names the data set in the report and in messages.

    Raises:
        SimpoError: a setting that is for comparisons only, no row of a known shape, too many bad rows, nothing that
            fits, or a tokenizer or chat template that cannot serve.
    """
    if settings.truncation == "paper":
        raise SimpoError("truncation: 'paper' is for comparisons, not for supervised fine-tuning; set prompt or drop")
    if settings.paper_tokenization:
        raise SimpoError("paper_tokenization: for comparisons, not for supervised fine-tuning; leave it out")
    check_dataset(dataset, label)
    if (found := already_tokenized(dataset, label, _Conversations.noun)) is not None:
        _check_one_response(dataset, label)
        return found
    return prepare_rows(dataset, tokenizer, _Conversations(tokenizer, settings, label))


def _check_one_response(dataset: Dataset, label: str) -> None:
    most = pc.max(pc.list_value_length(dataset.with_format("arrow")["response_ids"])).as_py()
    if most != 1:
        raise SimpoError(f"{label}: tokenized comparisons with up to {most} responses (simpo train), not conversations")


class _Conversations(Tokenization[RenderedTurns]):
    """A row becomes a prompt and one response, of which the answers are scored."""

    columns: ClassVar = {"prompt_ids": TOKENS, "response_ids": List(TOKENS), "scored": List(List(Value("bool")))}
    noun = "conversations"
    shapes = CONVERSATION_SHAPES

    def read(self, row: Mapping[str, Any], where: str) -> Conversation:
        return read_conversation(row, where)

    def drafts(self, row: Mapping[str, Any], where: str) -> list[Draft[RenderedTurns]]:
        conversation = self.read(row, where)
        sequences = self.renderer.render_turns(conversation)
        if conversation.unanswered:
            sequences[0] = replace(sequences[0], status=(f"cut: {UNANSWERED_CUT}", *sequences[0].status))
        return [Draft(rendered, conversation.extra) for rendered in sequences]

    def outcome(self, rendered: RenderedTurns, ids: list[list[int]]) -> tuple[Mapping[str, Any], list[str]]:
        """Ids with BOS and end-of-turn tokens, within the limits, and which are scored."""
        prompt = self.encoder.one_bos(ids[0])
        if not prompt:
            raise BadRow("empty prompt")
        response, scored, ends = self._response(rendered, ids)
        fitted = fit_turns(prompt, response, ends, self.settings, self.bos)
        kept = fitted.responses[0]
        values = {"prompt_ids": fitted.prompt, "response_ids": [kept], "scored": [scored[: len(kept)]]}
        return values, fitted.status

    def nothing_fits(self, mapped: Dataset) -> str:
        return shortest(mapped, self.settings, "conversation")

    def _response(self, rendered: RenderedTurns, ids: list[list[int]]) -> tuple[list[int], list[bool], list[int]]:
        """Ids of all that follows the prompt, which are scored, and how many there are up to the end of each answer.

        An answer's ids are what generation would have to produce after its prompt, and what follows it is as the next
        answer's prompt has it.
        """
        response: list[int] = []
        scored: list[bool] = []
        ends: list[int] = []
        for k, text in enumerate(rendered.answers):
            whole = ids[k + 1]
            mark = rendered.ends[k]
            end = _end_of_answer(whole, mark, rendered.between[k]) if k < len(rendered.between) else len(whole)
            answer = [*self.encoder.following(ids[k], text, whole[:end], rendered.marker), mark.token_id]
            rest = whole[end + 1 :]
            response += answer + rest
            scored += [True] * len(answer) + [False] * len(rest)
            ends.append(len(response) - len(rest))
        return response, scored, ends


def _end_of_answer(ids: list[int], end: EndOfTurn, between: str) -> int:
    """Position of the end-of-turn token that ``between`` follows: others may stand in it, after users' turns."""
    positions = [position for position, token_id in enumerate(ids) if token_id == end.token_id]
    return positions[-1 - between.count(end.text)]
