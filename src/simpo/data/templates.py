"""Rows to the text that a model reads: the tokenizer's chat template, or plain text without one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import ChatTemplate, as_object
from simpo.data.context import Context, as_messages
from simpo.data.conversations import Conversation
from simpo.data.encoding import LiteralText
from simpo.data.formats import Comparison, Response
from simpo.data.messages import REASONING, Message, reasoning_of
from simpo.data.rows import BadRow
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError

# Content that no template trims, splits or refuses, to see what a template writes after it.
_SENTINEL = "\ue000response\ue000"
_TRIMMED = "white space around an answer, which the chat template leaves out"
_ONE_ROW_EACH = "one row per scored answer, because the chat template renders earlier answers differently"
# How generation prompts that open the reasoning end; and how a model ends reasoning that it leaves empty.
_OPENINGS = {"<think>": "\n</think>\n\n", "<|channel>thought": "<channel|>"}
_EMPTY_REASONING = re.compile(r"(?:<think>\s*</think>|<\|channel>thought\s*<channel\|>)\s*\Z")


@dataclass(frozen=True)
class EndOfTurn:
    """How a template ends the assistant's turn.

    Attributes:
        token_id: the token that ends a response.
        text: its text.
        tail: all text that the template writes after the content of a final assistant message.
    """

    token_id: int
    text: str
    tail: str = ""

    @property
    def kept(self) -> str:
        """The part of ``tail`` before the end-of-turn token, which belongs to the response."""
        return self.tail.partition(self.text)[0] if self.text in self.tail else ""


@dataclass(frozen=True)
class Rendered:
    """Text of one comparison.

    Attributes:
        prompt: what generation would be fed.
        responses: what follows it in each conversation, without the end-of-turn token.
        marker: set if the messages hold special-token text, which then stands marked in the texts above
            (see :class:`simpo.data.encoding.LiteralText`).
        ends: id of the token that ends each response.
        status: entries for the report (:meth:`simpo.data.report.DataReport.of`).
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


@dataclass(frozen=True)
class _Answer:
    """What generation has to produce after a prompt, without the end-of-turn token, and the whole conversation."""

    prompt: str
    text: str
    end: EndOfTurn
    whole: str
    status: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Chat:
    """Messages of a row, as the template gets them."""

    opening: list[Message]
    following: list[Message]
    context: Context
    marker: str | None


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
        self._template = ChatTemplate(tokenizer, self._settings) if tokenizer.chat_template else None
        # The condition of the paper's code.
        source = self._template.source if self._template else ""
        self._insert_system = insert_system and ("system" in source or "<|im_start|>" in source)
        self.end = end_of_turn(tokenizer)
        # Structural tokens that may end a turn, the longest first.
        self._tokens = {
            token.content: token_id
            for token_id, token in sorted(
                tokenizer.added_tokens_decoder.items(), key=lambda item: -len(item[1].content)
            )
            if literal.pattern.fullmatch(token.content)
        }

    def render(self, comparison: Comparison) -> Rendered:
        """Render one comparison.

        Raises:
            BadRow: an empty response, messages that the template refuses, or a response that it renders in part only.
            SimpoError: messages without a template.
        """
        if self._template is None:
            return self._as_text(comparison)
        chat = self._chat(comparison.prompt, comparison.responses, comparison.context)
        prompt = self._render(chat.opening, chat.context, generation_prompt=not self._paper)
        answer = self._paper_answer if self._paper else self._answer
        answers = [answer(prompt, chat.opening, message, chat.context) for message in chat.following]
        status = (*self._ignored(prompt, chat), *(entry for found in answers for entry in found.status))
        return Rendered(
            prompt,
            tuple(found.text for found in answers),
            chat.marker,
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
        if self._template is None:
            comparison = Comparison(
                conversation.prompt, tuple(following), conversation.where, context=conversation.context
            )
            text = self._as_text(comparison)
            return [RenderedTurns((text.prompt,), text.responses, (self.end,))]
        chat = self._chat(conversation.prompt, following, conversation.context)
        messages = [*chat.opening, *chat.following]
        scored = [len(chat.opening) + i for i in conversation.scored] if conversation.scored else [len(messages) - 1]
        answers = []
        for i in scored:
            prompt = self._render(messages[:i], chat.context, generation_prompt=True)
            answers.append(self._answer(prompt, messages[:i], messages[i], chat.context))
        status = tuple(
            dict.fromkeys((*self._ignored(answers[-1].prompt, chat), *(s for a in answers for s in a.status)))
        )
        whole = answers[-1].whole
        if all(whole.startswith(found.prompt + found.text + found.end.text) for found in answers[:-1]) and (
            len(answers) == 1 or whole.startswith(answers[-1].prompt)
        ):
            between = [
                after.prompt[len(found.prompt + found.text) + len(found.end.text) :]
                for found, after in pairwise(answers)
            ]
            return [self._sequence(answers, between, chat.marker, status)]
        marks = [f"split: {_ONE_ROW_EACH}", *["part: "] * (len(answers) - 1)]
        return [
            self._sequence([found], (), chat.marker, (mark, *(status if k == 0 else found.status)))
            for k, (found, mark) in enumerate(zip(answers, marks, strict=True))
        ]

    @staticmethod
    def _sequence(
        answers: Sequence[_Answer], between: Sequence[str], marker: str | None, status: tuple[str, ...]
    ) -> RenderedTurns:
        return RenderedTurns(
            tuple(found.prompt for found in answers),
            tuple(found.text for found in answers),
            tuple(found.end for found in answers),
            tuple(between),
            marker,
            status,
        )

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

    def _chat(self, prompt: str | list[Message], rest: Sequence[Response], context: Context) -> _Chat:
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
        everything = [*opening, *following]
        answers = [message["content"] for message in everything if message["role"] == "assistant"]
        foreign = [_foreign(message) for message in everything]
        if marker := self._literal.marker_for([foreign, context.tools], answers=answers):
            opening, following = self._marked(opening, marker), self._marked(following, marker)
            context = replace(context, tools=self._literal.mark(context.tools, marker))
        if self._insert_system and opening[0]["role"] != "system":
            opening = [{"role": "system", "content": ""}, *opening]
        return _Chat(opening, following, context, marker)

    def _marked(self, messages: list[Message], marker: str) -> list[Message]:
        mark = self._literal.mark
        return [
            mark(message, marker) | {"content": mark(message["content"], marker, answer=message["role"] == "assistant")}
            for message in messages
        ]

    def _bare(self, content: str, message: Message | None = None) -> str:
        """A response without the end-of-turn text that it may carry already: it gets the token once."""
        while (stripped := content.rstrip()).endswith(self.end.text):
            content = stripped.removesuffix(self.end.text)
        if not content.strip() and not (message and (message.get("tool_calls") or reasoning_of(message))):
            raise BadRow("empty response")
        return content

    def _render(self, messages: Sequence[Message], context: Context, *, generation_prompt: bool = False) -> str:
        assert self._template is not None
        try:
            return self._template.render(messages, context, generation_prompt=generation_prompt)
        except BadRow as refused:
            if messages[0]["role"] == "system" and not self._template.has_system_role:
                raise BadRow(_NO_SYSTEM) from refused
            raise

    def _paper_answer(self, prompt: str, before: list[Message], message: Message, context: Context) -> _Answer:
        whole = self._render([*before, message], context)
        if not whole.startswith(prompt):
            raise BadRow(_NO_PREFIX)
        return _Answer(prompt, whole[len(prompt) :], self.end, whole)

    def _answer(self, prompt: str, before: list[Message], message: Message, context: Context) -> _Answer:
        """What generation has to produce after ``prompt``: the first form of the message that is rendered in full."""
        reasons: list[BadRow] = []
        for form in self._forms(message):
            try:
                whole = self._render([*before, form], context)
                text, end = self._ended(self._after(prompt, whole, before, form, context), before, form, context)
                status = self._check_whole(text, before, form, context)
            except BadRow as bad:
                reasons.append(bad)
            else:
                return _Answer(prompt, text, end, whole, status)
        raise reasons[0]

    def _forms(self, message: Message) -> Iterator[Message]:
        """The message, and with its reasoning where the template knows it."""
        yield message
        assert self._template is not None
        thought, content = _split(message)
        rest = {key: value for key, value in message.items() if key not in REASONING}
        if content != message["content"] or (thought and self._template.reasoning_key):
            yield {**rest, "content": content} | (
                {self._template.reasoning_key or REASONING[0]: thought} if thought else {}
            )
        if thought and "</think>" in self._template.source:
            yield {**rest, "content": f"<think>\n{thought}\n</think>\n\n{content}"}

    def _after(self, prompt: str, whole: str, before: list[Message], message: Message, context: Context) -> str:
        """The part of a whole conversation that follows its prompt.

        Where the prompt opens or closes the reasoning and the conversation's last turn is written without it, or where
        an earlier turn is written differently once it is answered, the prompt is no prefix of the conversation.
        """
        thought, _ = _split(message)
        closed = _EMPTY_REASONING.search(prompt)
        if closed and thought:
            raise BadRow(
                "reasoning, but the prompt that generation is fed already ends it; "
                "set chat_template_kwargs: {enable_thinking: true}, or leave the reasoning out"
            )
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        opened = next((tag for tag in _OPENINGS if prompt.rstrip().endswith(tag)), None)
        header = prompt[: closed.start()] if closed else prompt.rstrip().removesuffix(opened) if opened else prompt
        body = self._after_header(header, whole, before, message, context)
        if opened is None or closed:
            return body
        if body.startswith(opened):
            return body.removeprefix(opened)
        return f"{thought}{_OPENINGS[opened]}" + (body.lstrip("\n") if "</think>" in message["content"] else body)

    def _after_header(self, header: str, whole: str, before: list[Message], message: Message, context: Context) -> str:
        if whole.startswith(header):
            return whole[len(header) :]
        # An earlier turn is rendered differently: what is shared with another answer to it ends in this turn.
        other = {key: value for key, value in message.items() if key not in (*REASONING, "tool_calls")}
        other |= {key: _SENTINEL for key in REASONING if key in message}
        shared = os.path.commonprefix([whole, self._render([*before, {**other, "content": _SENTINEL}], context)])  # noqa: RUF071
        asked = self._render(before, context)
        opening = header.removeprefix(asked)
        place = whole.rfind(opening, 0, len(shared))
        if opening == header or not opening.strip() or place < 0:
            raise BadRow(_NO_PREFIX)
        return whole[place + len(opening) :]

    def _ended(self, rest: str, before: list[Message], message: Message, context: Context) -> tuple[str, EndOfTurn]:
        """An answer without what ends it, and what does: calls of tools may end with another token than text does."""
        tokens = self._last_tokens(rest)
        place = next((place for place, token in tokens if token == self.end.text), None)
        if place is not None:
            return rest[:place], self.end
        if self.end.text in self.end.tail and tokens and message.get("tool_calls"):
            place, token = tokens[-1]
            # What stands between two calls ends a call and not the turn.
            twice = {**message, "tool_calls": [*message["tool_calls"], *message["tool_calls"]]}
            try:
                more = self._render([*before, twice], context).count(token)
            except BadRow:
                more = 0
            if more <= self._render([*before, message], context).count(token):
                return rest[:place], EndOfTurn(self._tokens[token], token)
        return rest.removesuffix(self.end.tail), self.end

    def _last_tokens(self, text: str) -> list[tuple[int, str]]:
        """Positions and texts of the structural tokens that a text ends with, white space aside, in their order."""
        found: list[tuple[int, str]] = []
        every = tuple(self._tokens)
        while (text := text.rstrip()).endswith(every):
            token = next(token for token in every if text.endswith(token))
            found.insert(0, (len(text) - len(token), token))
            text = text.removesuffix(token)
        return found

    def _check_whole(self, text: str, before: list[Message], message: Message, context: Context) -> tuple[str, ...]:
        """Status entries of an answer that is rendered in full.

        Raises:
            BadRow: a part of it is missing.
        """
        assert self._template is not None
        thought, content = _split(message)
        if thought not in text:
            raise BadRow("reasoning that the chat template does not render; write it into the content, or leave it out")
        if content.strip() not in text:
            raise BadRow("the chat template does not render the whole content of an answer")
        if text.count("</think>") > 1 + content.count("</think>") + thought.count("</think>"):
            raise BadRow("the chat template writes the reasoning of an answer twice")
        calls = message.get("tool_calls", [])
        if calls:
            self._check_calls(calls, text, before, message, context)
        return () if content in text else (f"cut: {_TRIMMED}",)

    def _check_calls(
        self, calls: list[Message], text: str, before: list[Message], message: Message, context: Context
    ) -> None:
        """Raise :class:`BadRow` if a name or an argument of a tool call is not rendered.

        Templates write arguments in ways of their own, so the calls are rendered again with arguments that look the
        same in all of them.
        """
        assert self._template is not None
        if not self._template.renders_calls:
            raise BadRow("the chat template does not render tool calls")
        known, wanted = [], []
        for number, call in enumerate(calls):
            function = call["function"]
            arguments = as_object(function["arguments"])
            if arguments is None:
                if str(function["arguments"]) not in text:
                    raise BadRow(
                        "tool arguments that are no JSON object, which the chat template does not render as they are"
                    )
                continue
            name, values = (
                f"\ue000{number}\ue000",
                {key: f"\ue000{number}-{i}\ue000" for i, key in enumerate(arguments)},
            )
            known.append({**call, "function": {**function, "name": name, "arguments": values}})
            wanted += [name, *values.values()]
        again = self._render([*before, {**message, "tool_calls": known}], context) if known else ""
        if not all(one in again for one in wanted):
            raise BadRow("the chat template does not render all tool calls of an answer")

    def _ignored(self, prompt: str, chat: _Chat) -> tuple[str, ...]:
        """Status entries for what the row says and the template leaves out of the prompt.

        Raises:
            BadRow: what a user, a tool or the system said is not in the prompt.
        """
        assert self._template is not None
        template, context = self._template, chat.context
        found = [f"column {name!r}, which has no effect" for name in context.without_effect]
        found += [
            f"{name!r} of chat_template_kwargs, which the chat template never reads"
            for name in template.unread(context.kwargs)
        ]
        if context.tools and not template.reads_tools:
            found.append("tools, which the chat template does not render")
        for place, message in enumerate(chat.opening):
            if message["role"] == "assistant":
                thought, content = _split(message)
                if thought and thought not in prompt:
                    found.append("reasoning of earlier turns, which the chat template leaves out of a prompt")
                if content.strip() not in prompt:
                    found.append("content of earlier answers, which the chat template leaves out of a prompt")
                if message.get("tool_calls") and not template.renders_calls:
                    found.append("tool calls, which the chat template does not render")
            elif not self._reaches(prompt, chat, place):
                raise BadRow(
                    _NO_SYSTEM
                    if message["role"] == "system" and not template.has_system_role
                    else f"the chat template leaves out a message of role {message['role']!r}"
                )
            found += self._unread_keys(chat, place)
        return tuple(f"ignored: {what}" for what in dict.fromkeys(found))

    def _reaches(self, prompt: str, chat: _Chat, place: int) -> bool:
        """Whether the content of a message is in the prompt, as it is or in a form of the template's own."""
        content = chat.opening[place]["content"].strip()
        if content in prompt or json.dumps(content, ensure_ascii=False)[1:-1] in prompt:
            return True
        other = [*chat.opening]
        other[place] = {**other[place], "content": _SENTINEL}
        return _SENTINEL in self._render(other, chat.context, generation_prompt=True)

    def _unread_keys(self, chat: _Chat, place: int) -> Iterator[str]:
        """Of a message's keys without a usual meaning those that change nothing in the rendered text."""
        messages = [*chat.opening, *chat.following[:1]]
        for key, value in chat.opening[place].items():
            if key in _USUAL_KEYS or value in (None, "", [], {}):
                continue
            without = [*messages]
            without[place] = {name: item for name, item in messages[place].items() if name != key}
            if self._render(without, chat.context) == self._render(messages, chat.context):
                yield f"{key!r} of a message, which the chat template never reads"


_USUAL_KEYS = {"role", "content", "tool_calls", "tool_call_id", *REASONING}
_NO_PREFIX = (
    "the chat template renders a prompt that is not the beginning of the rendered conversation; "
    "set chat_template to one that does"
)
_NO_SYSTEM = (
    "the chat template has no system role; set system_message: fold, which writes the system message into the first "
    "user message"
)


def _split(message: Message) -> tuple[str, str]:
    """Reasoning and content of an assistant's message, whether it stands under a key of its own or within tags."""
    content = message["content"]
    if thought := reasoning_of(message).strip():
        return thought, content
    head, end, rest = content.partition("</think>")
    if not end or (head.lstrip() and "<think>" in head and not head.lstrip().startswith("<think>")):
        return "", content
    return head.rpartition("<think>")[2].strip(), rest.lstrip("\n")


def _foreign(message: Message) -> Message:
    """The parts of a message that are not an answer's content."""
    if message["role"] != "assistant":
        return message
    return {key: value for key, value in message.items() if key != "content"}


def _folded(messages: list[Message]) -> list[Message]:
    """Messages with the system message written into the user's first one.

    Raises:
        BadRow: no message of a user follows.
    """
    if messages[0]["role"] not in ("system", "developer"):
        return messages
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        raise BadRow("a system message that no user message follows, so that it cannot be folded")
    content = "\n\n".join(text for text in (system["content"], rest[0]["content"]) if text)
    return [{**rest[0], "content": content}, *rest[1:]]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """What ends a response: the first special token after a rendered response, else the tokenizer's EOS.

    Raises:
        SimpoError: there is neither, or the template does not render a user's and an assistant's message.
    """
    tail = _tail(tokenizer) if tokenizer.chat_template else ""
    found = [
        (position, -len(token.content), token.content, token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        # Some tokenizers have added tokens of nothing but white space, for code.
        if (token.special or token.content.strip()) and (position := tail.find(token.content)) >= 0
    ]
    if found:
        *_, text, token_id = min(found)
        return EndOfTurn(token_id, text, tail)
    if tokenizer.eos_token_id is None:
        raise SimpoError("the tokenizer has no EOS and its chat template ends no turn; set an eos_token")
    return EndOfTurn(tokenizer.eos_token_id, tokenizer.eos_token, tail)


def _tail(tokenizer: PreTrainedTokenizerBase) -> str:
    template = ChatTemplate(tokenizer, RenderSettings())
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": _SENTINEL}]
    try:
        text = template.render(messages, Context())
    except BadRow as refused:
        raise SimpoError(f"a user and an assistant message: {refused.reason}") from refused
    if _SENTINEL not in text:
        raise SimpoError("the chat template leaves out the assistant's message; set chat_template to another")
    return text.rpartition(_SENTINEL)[2]
