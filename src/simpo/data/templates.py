"""Rows to the text that a model reads, through a chat template or without one, and what the template left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import NO_SYSTEM_ROLE, SENTINEL, ChatTemplate
from simpo.data.encoding import LiteralText
from simpo.data.formats import Comparison, Conversation
from simpo.data.messages import REASONING, Context, Message, Response, as_messages, reasoning_of, split_reasoning
from simpo.data.rows import BadRow
from simpo.data.settings import RenderSettings
from simpo.data.turns import AnswerCutter, EndOfTurn, end_of_turn
from simpo.errors import SimpoError

__all__ = ["EndOfTurn", "Rendered", "RenderedTurns", "Renderer", "end_of_turn"]


# ---- What a row says and a chat template leaves out: counted, or a bad row where somebody's words would be
# lost.


_USUAL_KEYS = {"role", "content", "tool_calls", "tool_call_id", *REASONING}


def left_out(
    template: ChatTemplate,
    prompt: str,
    asked: Sequence[Message],
    conversations: Sequence[Sequence[Message]],
    context: Context,
) -> tuple[str, ...]:
    """Status entries for what a row says and the template never reads, or leaves out of the prompt.

    Args:
        template: renders.
        prompt: the rendered prompt of the last answer.
        asked: its messages.
        conversations: all messages of the row, in each of its conversations.
        context: the row's.

    Raises:
        BadRow: what a user, a tool or the system said is not in the prompt.
    """
    found = [f"column {name!r}, which has no effect" for name in context.without_effect]
    found += [f"variable {name!r}, which the chat template never reads" for name in template.unread(context.kwargs)]
    if context.tools and not template.reads_tools:
        found.append("tools, which the chat template does not render")
    for place, message in enumerate(asked):
        if message["role"] == "assistant":
            found += _of_earlier_answer(template, prompt, message)
        elif not _is_rendered(template, prompt, asked, place, context):
            if message["role"] == "system" and not template.has_system_role:
                raise BadRow(NO_SYSTEM_ROLE)
            raise BadRow(f"the chat template leaves out a message of role {message['role']!r}")
    for messages in conversations:
        found += _unread_keys(template, messages, context)
    return tuple(f"ignored: {what}" for what in dict.fromkeys(found))


def _of_earlier_answer(template: ChatTemplate, prompt: str, message: Message) -> Iterator[str]:
    thought, content = split_reasoning(message)
    if thought and thought not in prompt:
        yield "reasoning of earlier turns, which the chat template drops"
    if content.strip() not in prompt:
        yield "content of earlier answers, which the chat template drops"
    if message.get("tool_calls") and not template.renders_calls:
        yield "tool calls, which the chat template does not render"


def _is_rendered(
    template: ChatTemplate, prompt: str, messages: Sequence[Message], place: int, context: Context
) -> bool:
    """Whether the content of a message is in the prompt, as it is or in a form of the template's own."""
    content = messages[place]["content"].strip()
    if content in prompt or json.dumps(content, ensure_ascii=False)[1:-1] in prompt:
        return True
    return template.shows(_replaced(messages, place, {**messages[place], "content": SENTINEL}), [SENTINEL], context)


def _unread_keys(template: ChatTemplate, messages: Sequence[Message], context: Context) -> Iterator[str]:
    """Keys of messages that have no usual meaning and do not change the rendered text."""
    for place, message in enumerate(messages):
        for key, value in message.items():
            if key in _USUAL_KEYS or value in ("", [], {}):
                continue
            without = _replaced(messages, place, {name: item for name, item in message.items() if name != key})
            try:
                unread = template.render(without, context) == template.render(messages, context)
            except BadRow:
                unread = False
            if unread:
                yield f"{key!r} of a message, which the chat template never reads"


def _replaced(messages: Sequence[Message], place: int, message: Message) -> list[Message]:
    return [*messages[:place], message, *messages[place + 1 :]]


@dataclass(frozen=True)
class Rendered:
    """Text of one comparison.

    Attributes:
        prompt: what generation would be fed.
        responses: what follows it in each conversation, without the end-of-turn token.
        marker: set if the messages hold special-token text, which then stands marked in the texts above
            (see :class:`simpo.data.encoding.LiteralText`).
        ends: id of the token that ends each response.
        status: entries for the report (:meth:`simpo.data.mapping.DataReport.of`).
    """

    prompt: str
    responses: tuple[str, ...]
    marker: str | None = None
    ends: tuple[int, ...] = ()
    status: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt, and each response after it."""
        return (self.prompt, *(self.prompt + response for response in self.responses))


@dataclass(frozen=True)
class RenderedTurns:
    """Text of one sequence with ``n`` answers that are learnt.

    Attributes:
        prompts: ``n`` texts, each what generation would be fed for an answer and the beginning of the next one.
        answers: what follows each, without the end-of-turn token.
        ends: what ends each answer.
        between: ``n - 1`` texts from the end-of-turn token of an answer to the next answer.
        marker: as of :class:`Rendered`.
        status: as of :class:`Rendered`.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    ends: tuple[EndOfTurn, ...]
    between: tuple[str, ...] = ()
    marker: str | None = None
    status: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts, and the whole conversation without its last end-of-turn token."""
        return (*self.prompts, self.prompts[-1] + self.answers[-1])


class Renderer:
    """Renders comparisons and conversations for one tokenizer.

    Args:
        tokenizer: with a chat template, all rows are conversations; without one, all are text.
        literal: finds special-token text inside messages.
        settings: variables of the template, and what becomes of system messages.
        paper: render as the paper's code did: the prompt without a generation prompt, and as response all
            the rest, assistant header and text after the end-of-turn token included.
        insert_system: put an empty system message first where there is none and the template knows one.

    Raises:
        SimpoError: the template does not render, nothing ends a turn, or a setting cannot be applied.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        literal: LiteralText,
        settings: RenderSettings | None = None,
        *,
        paper: bool = False,
        insert_system: bool = False,
    ) -> None:
        self._literal = literal
        self._settings = settings or RenderSettings()
        self._paper = paper
        self.end = end_of_turn(tokenizer)
        self._cutter: AnswerCutter | None = None
        self._insert_system = False
        if not tokenizer.chat_template:
            if self._settings != RenderSettings():
                raise SimpoError("chat_template_kwargs, system_message: there is no chat template; leave them out")
        else:
            template = ChatTemplate(tokenizer, self._settings)
            added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: -len(item[1].content))
            tokens = {token.content: number for number, token in added if literal.pattern.fullmatch(token.content)}
            self._cutter = AnswerCutter(template, self.end, tokens)
            # The condition of the paper's code.
            self._insert_system = insert_system and ("system" in template.source or "<|im_start|>" in template.source)

    def render(self, comparison: Comparison) -> Rendered:
        """Render one comparison.

        Raises:
            BadRow: an empty response, messages that the template refuses, or a response that it renders in part only.
            SimpoError: messages without a template.
        """
        if self._cutter is None:
            return self._as_text(comparison)
        opening, following, context, marker = self._chat(
            comparison.prompt, comparison.responses, comparison.context, self._cutter.template
        )
        prompt = self._cutter.template.render(opening, context, generation_prompt=not self._paper)
        answer = self._cutter.as_paper if self._paper else self._cutter.answer
        answers = [answer(prompt, opening, message, context) for message in following]
        conversations = [[*opening, message] for message in following] or [opening]
        ignored = left_out(self._cutter.template, prompt, opening, conversations, context)
        status = (*ignored, *(entry for found in answers for entry in found.status))
        return Rendered(
            prompt,
            tuple(found.text for found in answers),
            marker,
            tuple(found.end.token_id for found in answers),
            tuple(dict.fromkeys(status)),
        )

    def render_turns(self, conversation: Conversation) -> list[RenderedTurns]:
        """Render one conversation: as one sequence, or as one for each answer if the template renders an earlier answer
        differently from what generation has to produce.

        Raises:
            BadRow: an empty answer, messages that the template refuses, or an answer that it does not render in full.
            SimpoError: messages without a template.
        """
        completion = conversation.completion
        following = [completion] if isinstance(completion, str) else completion
        if self._cutter is None:
            comparison = Comparison(
                conversation.prompt, tuple(following), conversation.where, context=conversation.context
            )
            text = self._as_text(comparison)
            return [RenderedTurns((text.prompt,), text.responses, (self.end,))]
        template = self._cutter.template
        opening, rest, context, marker = self._chat(conversation.prompt, following, conversation.context, template)
        messages = [*opening, *rest]
        answers = []
        for i in [len(opening) + place for place in conversation.scored] or [len(opening)]:
            prompt = template.render(messages[:i], context, generation_prompt=True)
            answers.append(self._cutter.answer(prompt, messages[:i], messages[i], context))
        ignored = left_out(template, answers[-1].prompt, messages[:i], [messages], context)
        status = tuple(dict.fromkeys((*ignored, *(entry for found in answers for entry in found.status))))
        whole = answers[-1].whole
        if len(answers) == 1 or (
            all(whole.startswith(found.prompt + found.text + found.end.text) for found in answers[:-1])
            and whole.startswith(answers[-1].prompt)
        ):
            sequences, statuses = [answers], [status]
        else:
            sequences = [[found] for found in answers]
            split = "split: one row per scored answer, because earlier answers are rendered differently"
            statuses = [(split, *status), *(("part: ", *found.status) for found in answers[1:])]
        return [
            RenderedTurns(
                tuple(found.prompt for found in sequence),
                tuple(found.text for found in sequence),
                tuple(found.end for found in sequence),
                tuple(
                    after.prompt[len(found.prompt + found.text + found.end.text) :]
                    for found, after in pairwise(sequence)
                ),
                marker,
                entries,
            )
            for sequence, entries in zip(sequences, statuses, strict=True)
        ]

    def _as_text(self, comparison: Comparison) -> Rendered:
        if not isinstance(comparison.prompt, str):
            raise SimpoError(
                f"{comparison.where}: a conversation, but the tokenizer has no chat template; "
                "set chat_template to one, or give strings"
            )
        if comparison.context.columns:
            raise BadRow(f"{next(iter(comparison.context.columns))}, but the tokenizer has no chat template")
        responses = tuple(self._bare(str(text)) for text in comparison.responses)
        ignored = tuple(f"ignored: column {name!r}" for name in comparison.context.without_effect)
        return Rendered(comparison.prompt, responses, None, (self.end.token_id,) * len(responses), ignored)

    def _chat(
        self, prompt: str | list[Message], rest: Sequence[Response], context: Context, template: ChatTemplate
    ) -> tuple[list[Message], list[Message], Context, str | None]:
        """The row's messages and tools, special-token text marked, the system message where it belongs."""
        opening, following = as_messages(prompt, rest)
        following = [
            {**message, "content": self._bare(message["content"], message)}
            if message["role"] == "assistant"
            else message
            for message in following
        ]
        if self._settings.system_message == "fold":
            opening = _folded(opening)
        opening = list(map(template.with_arguments, opening))
        following = list(map(template.with_arguments, following))
        everything = [*opening, *following]
        answers = [message["content"] for message in everything if message["role"] == "assistant"]
        foreign = [_foreign(message) for message in everything]
        if marker := self._literal.marker_for([foreign, context.tools], answers=answers):
            opening, following = self._marked(opening, marker), self._marked(following, marker)
            context = replace(context, tools=self._literal.mark(context.tools, marker))
        if self._insert_system and opening[0]["role"] != "system":
            opening = [{"role": "system", "content": ""}, *opening]
        return opening, following, context, marker

    def _marked(self, messages: list[Message], marker: str) -> list[Message]:
        mark = self._literal.mark
        return [
            mark(message, marker) | {"content": mark(message["content"], marker, message["role"])}
            for message in messages
        ]

    def _bare(self, content: str, message: Message | None = None) -> str:
        """A response without the end-of-turn text that it may carry already: it gets the token once."""
        while (stripped := content.rstrip()).endswith(self.end.text):
            content = stripped.removesuffix(self.end.text)
        if not content.strip() and not (message and (message.get("tool_calls") or reasoning_of(message))):
            raise BadRow("empty response")
        return content


def _foreign(message: Message) -> Message:
    """The parts of a message that are not an answer's content."""
    if message["role"] != "assistant":
        return message
    return {key: value for key, value in message.items() if key != "content"}


def _folded(messages: list[Message]) -> list[Message]:
    """Messages with the first system messages written into the user's first one.

    Raises:
        BadRow: no message of a user follows.
    """
    system = list(takewhile(lambda message: message["role"] in ("system", "developer"), messages))
    if not system:
        return messages
    asked = messages[len(system) :]
    if not asked or asked[0]["role"] != "user":
        raise BadRow("a system message that no user message follows, so that it cannot be folded")
    content = "\n\n".join(message["content"] for message in [*system, asked[0]] if message["content"])
    return [{**asked[0], "content": content}, *asked[1:]]
