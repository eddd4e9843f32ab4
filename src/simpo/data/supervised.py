"""Conversations to token ids for supervised fine-tuning: the assistant's turns are scored, nothing else is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pyarrow.compute as pc
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from simpo.data.conversations import CONVERSATION_SHAPES, check_conversation_shape, recognise_conversation
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
from simpo.data.templates import EndOfTurn, RenderedTurns
from simpo.data.truncation import fit_turns
from simpo.errors import SimpoError

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
    check_rows(dataset, label)
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

    def check_shape(self, row: Mapping[str, Any]) -> None:
        check_conversation_shape(row)

    def drafts(self, row: Mapping[str, Any], where: str) -> list[Draft[RenderedTurns]]:
        conversation = recognise_conversation(row, where)
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
