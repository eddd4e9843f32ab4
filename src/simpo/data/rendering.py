"""Renders comparisons and conversations as text: prompts to generate from, and the answers to produce.

Nothing in a row is lost silently: whatever the chat template leaves out is counted or makes the row a bad row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import (
    NO_SYSTEM_ROLE,
    SENTINEL,
    AnswerNormalizer,
    ChatTemplate,
    EndOfTurn,
    as_object,
    end_of_turn,
)
from simpo.data.encoding import LiteralText
from simpo.data.formats import Comparison, Conversation
from simpo.data.messages import (
    IMAGE,
    REASONING,
    ROLES,
    Context,
    Message,
    as_messages,
    reasoning_of,
    split_reasoning,
)
from simpo.data.rows import PART, BadRow
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError

_EMPTY = "empty response"
_TRIMMED = "whitespace around an answer, which the chat template strips"
_NO_PREFIX = (
    "the rendered prompt is not a prefix of the rendered conversation; "
    "set chat_template to another one, or system_message: fold if a system message is the reason"
)
_SPLIT = "split: one row per scored answer, because earlier answers are rendered differently"
_USUAL_KEYS = {"role", "content", "tool_calls", "tool_call_id", *REASONING}
# How generation prompts open the reasoning -> how the answer closes it: after some reasoning, and after none.
_OPENINGS = {
    "<think>": ("\n</think>\n\n", "\n</think>\n\n"),
    "<|channel>thought": ("\n<channel|>", "<channel|>"),
}
_ENDED_REASONING = re.compile(
    "|".join(rf"(?:{re.escape(tag)}\s*)?{re.escape(end.strip())}\s*\Z" for tag, (end, _) in _OPENINGS.items())
)


@dataclass(frozen=True)
class Answer:
    """The text that generation should produce after a prompt."""

    prompt: str  # the input to generation
    text: str  # what follows it, without the end-of-turn token
    end: EndOfTurn  # what ends the answer
    whole: str = ""  # the rendered conversation that the answer was taken from
    status: tuple[str, ...] = ()  # entries for the report (DataReport.of)


@dataclass(frozen=True)
class Rendered:
    """The text of a prompt and of its answers."""

    prompt: str  # the input to generation
    answers: tuple[Answer, ...]
    # Set if the messages contain special-token text; it is marked with this in the texts (see LiteralText).
    marker: str | None = None
    status: tuple[str, ...] = ()  # entries for the report (DataReport.of)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to encode: the prompt alone, and the prompt followed by each answer."""
        return (self.prompt, *(self.prompt + answer.text for answer in self.answers))


@dataclass(frozen=True)
class RenderedTurns(Rendered):
    """The text of one sequence: each prompt begins with the previous prompt and its answer."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt of each answer, and the whole text up to the end of the last answer."""
        last = self.answers[-1]
        return (*(answer.prompt for answer in self.answers), last.prompt + last.text)

    @property
    def between(self) -> list[str]:
        """The text between each answer's end-of-turn token and the next answer."""
        pairs = pairwise(self.answers)
        return [following.prompt[len(answer.prompt + answer.text + answer.end.text) :] for answer, following in pairs]


class Renderer:
    """Renders comparisons and conversations for one tokenizer.

    Args:
        tokenizer: with a chat template, all rows are conversations; without one, all are text.
        literal: finds special-token text inside messages.
        settings: variables of the template, and how system messages are rendered.
        paper: render like the paper's code: the prompt without a generation prompt, and everything else as the
            response, including the assistant header and the text after the end-of-turn token.
        insert_system: start with an empty system message if there is none and the template supports one.
        whole_answers: reject answers whose reasoning does not end. Right for training; turn off for answers that are
            only scored, because they may have been truncated.

    Attributes:
        end: how the template ends a turn.
        notices: surprising properties of the chat template, as sentences for the report.
        roles: the roles that messages may have: the standard ones and any that the chat template names.
        options: the variables of the chat template that users may set.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        literal: LiteralText,
        settings: RenderSettings | None = None,
        *,
        paper: bool = False,
        insert_system: bool = False,
        whole_answers: bool = True,
    ) -> None:
        self._literal = literal
        self._settings = settings or RenderSettings()
        self._paper, self._whole_answers = paper, whole_answers
        self.end = end_of_turn(tokenizer)
        self.notices: list[str] = []
        self.roles = frozenset(ROLES)
        self.options: set[str] = set()
        self._normalizer = AnswerNormalizer(tokenizer, self.end)
        self._extractor: _AnswerExtractor | None = None
        self._insert_system = False
        if not tokenizer.chat_template:
            if self._settings != RenderSettings():
                raise SimpoError("chat_template_kwargs, system_message: there is no chat template; remove these keys")
        else:
            template = ChatTemplate(tokenizer, self._settings)
            self.notices = [] if paper else template.notices(self.end)
            self.roles |= template.named_roles
            self.options = template.options
            added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: -len(item[1].content))
            tokens = {token.content: number for number, token in added if literal.pattern.fullmatch(token.content)}
            self._extractor = _AnswerExtractor(template, self.end, tokens)
            # Same condition as in the paper's code.
            self._insert_system = insert_system and ("system" in template.source or "<|im_start|>" in template.source)

    def render(self, comparison: Comparison) -> Rendered:
        """Render one comparison."""
        if self._extractor is None:
            return self._as_text(comparison)
        template = self._extractor.template
        opening, following, context, marker = self._prepare_messages(comparison, template)
        prompt = template.render(opening, context, generation_prompt=not self._paper)
        answer = self._extractor.paper_answer if self._paper else self._extractor.answer
        answers = tuple(answer(prompt, opening, message, context) for message in following)
        conversations = [[*opening, message] for message in following] or [opening]
        return Rendered(prompt, answers, marker, _status(template, prompt, opening, conversations, context, answers))

    def render_turns(self, conversation: Conversation) -> list[RenderedTurns]:
        """Render one conversation as one sequence, or as one per answer if the template renders earlier answers
        differently from what generation should produce.
        """
        if self._extractor is None:
            text = self._as_text(conversation)
            return [RenderedTurns(text.prompt, text.answers, status=text.status)]
        template = self._extractor.template
        opening, rest, context, marker = self._prepare_messages(conversation, template)
        messages = [*opening, *rest]
        answers = []
        for end in [len(opening) + index for index in conversation.scored] or [len(opening)]:
            prompt = template.render(messages[:end], context, generation_prompt=True)
            answers.append(self._extractor.answer(prompt, messages[:end], messages[end], context))
        status = _status(template, answers[-1].prompt, messages[:end], [messages], context, answers)
        *earlier, last = answers
        if not earlier or (
            all(last.whole.startswith(answer.prompt + answer.text + answer.end.text) for answer in earlier)
            and last.whole.startswith(last.prompt)
        ):
            return [RenderedTurns(answers[0].prompt, tuple(answers), marker, status)]
        statuses = [(_SPLIT, *status), *((PART, *answer.status) for answer in answers[1:])]
        return [
            RenderedTurns(answer.prompt, (answer,), marker, entries)
            for answer, entries in zip(answers, statuses, strict=True)
        ]

    def _as_text(self, comparison: Comparison) -> Rendered:
        prompt, context = comparison.prompt, comparison.context
        if not isinstance(prompt, str):
            raise SimpoError(
                f"{comparison.where}: a conversation, but the tokenizer has no chat template; "
                "set chat_template, or give strings"
            )
        if context.columns:
            raise BadRow(f"the row has {next(iter(context.columns))}, but the tokenizer has no chat template")
        texts = [self._normalizer.normalize(str(text)) for text in comparison.responses]
        if not all(text.strip() for text in texts):
            raise BadRow(_EMPTY)
        answers = tuple(Answer(prompt, text, self.end) for text in texts)
        return Rendered(prompt, answers, status=tuple(f"ignored: column {name!r}" for name in context.without_effect))

    def _prepare_messages(
        self, comparison: Comparison, template: ChatTemplate
    ) -> tuple[list[Message], list[Message], Context, str | None]:
        """Return the messages of the prompt and those after it, the context, and the marker of special-token text."""
        opening, following = as_messages(comparison.prompt, comparison.responses)
        if self._settings.system_message == "fold":
            opening = _fold_system_messages(opening)
        if self._insert_system and opening[0]["role"] != "system":
            opening = [{"role": "system", "content": ""}, *opening]
        size = len(opening)
        messages = [template.adapt_arguments(self._strip_end_of_turn(message)) for message in (*opening, *following)]
        for message in messages[size:]:
            content = message["content"]
            opens = self._whole_answers and "</think>" in template.source and content.lstrip().startswith("<think>")
            if message["role"] == "assistant" and opens and "</think>" not in content:
                raise BadRow("reasoning does not end: <think> without </think>")
            has_answer = content.strip() or message.get("tool_calls") or reasoning_of(message)
            if message["role"] == "assistant" and not has_answer:
                raise BadRow(_EMPTY)
        # The assistant may write some structural tokens, but only in the content of its messages.
        contents = [message["content"] for message in messages if message["role"] == "assistant"]
        others = [
            {key: value for key, value in message.items() if key != "content" or message["role"] != "assistant"}
            for message in messages
        ]
        context = comparison.context
        if marker := self._literal.marker_for([others, context.tools], answers=contents):
            mark = self._literal.mark
            messages = [
                mark(message, marker) | {"content": mark(message["content"], marker, message["role"])}
                for message in messages
            ]
            context = replace(context, tools=mark(context.tools, marker))
        return messages[:size], messages[size:], context, marker

    def _strip_end_of_turn(self, message: Message) -> Message:
        """Return a message, without the end of turn that an assistant's content may include."""
        if message["role"] != "assistant":
            return message
        return {**message, "content": self._normalizer.normalize(message["content"])}


def _fold_system_messages(messages: list[Message]) -> list[Message]:
    """Merge the leading system messages into the first user message."""
    system = list(takewhile(lambda message: message["role"] in ("system", "developer"), messages))
    if not system:
        return messages
    asked = messages[len(system) :]
    if not asked or asked[0]["role"] != "user":
        raise BadRow("a system message cannot be folded, because no user message follows it")
    content = "\n\n".join(message["content"] for message in [*system, asked[0]] if message["content"])
    return [{**asked[0], "content": content}, *asked[1:]]


# ---- Extracting the assistant's turn from a rendered conversation.


class _AnswerExtractor:
    """Extracts answers from rendered conversations; ``tokens`` maps structural tokens to ids, longest first."""

    def __init__(self, template: ChatTemplate, end: EndOfTurn, tokens: Mapping[str, int]) -> None:
        self.template, self._end, self._tokens = template, end, tokens

    def answer(self, prompt: str, before: list[Message], message: Message, context: Context) -> Answer:
        """Return the answer to ``prompt``, from the first variant of the message that is rendered completely."""
        reasons: list[BadRow] = []
        for form in self._variants(message):
            try:
                whole = self.template.render([*before, form], context)
                text, end = self._split_end(
                    self._answer_after_prompt(prompt, whole, before, form, context), before, form, context
                )
                status = self._check_complete(text, before, form, context)
            except BadRow as bad:
                reasons.append(bad)
            else:
                return Answer(prompt, text, end, whole, status)
        raise reasons[0]

    def paper_answer(self, prompt: str, before: list[Message], message: Message, context: Context) -> Answer:
        """Return everything after ``prompt``, as in the paper's code."""
        whole = self.template.render([*before, message], context)
        if not whole.startswith(prompt):
            raise BadRow(_NO_PREFIX)
        text = whole[len(prompt) :]
        return Answer(prompt, text, self._end, whole, self._check_complete(text, before, message, context))

    def _variants(self, message: Message) -> Iterator[Message]:
        """Yield the message as it is, then with its reasoning wherever else the template may look for it."""
        yield message
        thought, content = split_reasoning(message)
        rest = {key: value for key, value in message.items() if key not in REASONING}
        if content != message["content"] or (thought and self.template.reasoning_key):
            reasoning = {self.template.reasoning_key or REASONING[0]: thought} if thought else {}
            yield {**rest, "content": content, **reasoning}
        if thought and "</think>" in self.template.source:
            yield {**rest, "content": f"<think>\n{thought}\n</think>\n\n{content}"}

    def _answer_after_prompt(
        self, prompt: str, whole: str, before: list[Message], message: Message, context: Context
    ) -> str:
        """Return the part of a rendered conversation that follows its prompt.

        The prompt is not always a prefix of the conversation: it may open or close the reasoning even though the last
        turn is rendered without any, and an earlier turn may be rendered differently once it has been answered.
        """
        thought, _ = split_reasoning(message)
        closed = _ENDED_REASONING.search(prompt)
        if closed and thought:
            raise BadRow(
                "an answer has reasoning, but the generation prompt already closes it; set chat_template_kwargs: "
                "{enable_thinking: true} (some templates: {thinking: true}), or remove the reasoning"
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
        if body.startswith(_OPENINGS[opened][1].strip()):
            return thought + body
        body = body.lstrip("\n") if "</think>" in message["content"] else body
        return thought + _OPENINGS[opened][not thought] + body

    def _after_header(self, header: str, whole: str, before: list[Message], message: Message, context: Context) -> str:
        if whole.startswith(header):
            return whole[len(header) :]
        # An earlier turn is rendered differently. Two answers to the same messages first differ within this turn.
        other = {key: value for key, value in message.items() if key not in (*REASONING, "tool_calls")}
        other |= {key: SENTINEL for key in REASONING if key in message}
        shared = os.path.commonprefix(  # noqa: RUF071 - texts
            [whole, self.template.render([*before, {**other, "content": SENTINEL}], context)]
        )
        opening = header.removeprefix(self.template.render(before, context))
        position = whole.rfind(opening, 0, len(shared))
        body = whole[position + len(opening) :]
        # The header may have been found in an earlier turn. What follows this turn's is the same for any question.
        asking = [*before[:-1], {**before[-1], "content": SENTINEL}]
        if (
            opening == header
            or not opening.strip()
            or position < 0
            or not self.template.render([*asking, message], context).endswith(opening + body)
        ):
            raise BadRow(_NO_PREFIX)
        return body

    def _split_end(self, rest: str, before: list[Message], message: Message, context: Context) -> tuple[str, EndOfTurn]:
        """Split an answer from what ends it; tool calls may end with a different token than text does."""
        tokens: list[tuple[int, str]] = []  # structural tokens at the end, ignoring whitespace
        remaining = rest
        while token := next((token for token in self._tokens if remaining.rstrip().endswith(token)), None):
            remaining = remaining.rstrip().removesuffix(token)
            tokens.insert(0, (len(remaining), token))
        position = next((position for position, token in tokens if token == self._end.text), None)
        if position is not None:
            return rest[:position], self._end
        if self._end.text in self._end.tail and tokens and message.get("tool_calls"):
            position, token = tokens[-1]
            # A token that is also written between two calls ends a call, not the turn.
            twice = {**message, "tool_calls": [*message["tool_calls"], *message["tool_calls"]]}
            try:
                count = self.template.render([*before, twice], context).count(token)
            except BadRow:
                count = 0
            if count <= self.template.render([*before, message], context).count(token):
                return rest[:position], EndOfTurn(self._tokens[token], token)
        return rest.removesuffix(self._end.tail), self._end

    def _check_complete(self, text: str, before: list[Message], message: Message, context: Context) -> tuple[str, ...]:
        """Return status entries for an answer; raise BadRow if part of it is not rendered."""
        thought, content = split_reasoning(message)
        if thought not in text:
            raise BadRow("the chat template does not render the reasoning; move it into the content, or remove it")
        if content.strip() not in text:
            raise BadRow("the chat template does not render the whole content of an answer")
        if text.count("</think>") > 1 + content.count("</think>") + thought.count("</think>"):
            raise BadRow("the chat template writes the reasoning of an answer twice")
        if calls := message.get("tool_calls"):
            self._check_calls(calls, text, before, message, context)
        return () if content in text else (f"cut: {_TRIMMED}",)

    def _check_calls(
        self, calls: list[Message], text: str, before: list[Message], message: Message, context: Context
    ) -> None:
        """Raise BadRow if the name or an argument of a tool call is not rendered.

        Templates format arguments differently, so the calls are rendered again with arguments that every template
        writes the same way.
        """
        if not self.template.renders_tool_calls:
            raise BadRow("the chat template does not render tool calls")
        probes, expected = [], []
        for number, call in enumerate(calls):
            function = call["function"]
            arguments = as_object(function["arguments"])
            if arguments is None:
                if str(function["arguments"]) not in text:
                    raise BadRow("tool arguments are not a JSON object, and the chat template changes them")
                continue
            name = f"\uf8ff{number}\uf8ff"
            values = {key: f"\uf8ff{number}-{i}\uf8ff" for i, key in enumerate(arguments)}
            probes.append({**call, "function": {**function, "name": name, "arguments": values}})
            expected += [name, *values.values()]
        rendered = self.template.render([*before, {**message, "tool_calls": probes}], context) if probes else ""
        if not all(text in rendered for text in expected):
            raise BadRow("the chat template does not render all tool calls of an answer")


# ---- Detecting content that a chat template leaves out.


def _status(
    template: ChatTemplate,
    prompt: str,
    question: Sequence[Message],
    conversations: Sequence[Sequence[Message]],
    context: Context,
    answers: Sequence[Answer],
) -> tuple[str, ...]:
    """Return status entries of the answers, and for anything that the template never reads or omits from the prompt.

    ``question`` holds the messages of the prompt; raises BadRow if a user, tool or system message among them is not
    rendered. ``conversations`` holds all messages of each of the row's conversations.
    """
    ignored = [f"column {name!r}, which has no effect" for name in context.without_effect]
    ignored += [
        f"variable {name!r}, which the chat template never reads" for name in template.unread_variables(context.kwargs)
    ]
    if context.tools and not template.reads_tools:
        ignored.append("tools, which the chat template does not render")
    for index, message in enumerate(question):
        if message["role"] == "assistant":
            thought, content = split_reasoning(message)
            if thought and thought not in prompt:
                ignored.append("reasoning of earlier turns, which the chat template drops")
            if content.strip() not in prompt:
                ignored.append("content of earlier answers, which the chat template drops")
            if message.get("tool_calls") and not template.renders_tool_calls:
                ignored.append("tool calls, which the chat template does not render")
        elif not _is_rendered(template, prompt, question, index, context):
            if message["role"] == "system" and not template.has_system_role:
                raise BadRow(NO_SYSTEM_ROLE)
            raise BadRow(f"the chat template does not render a message with role {message['role']!r}")
    for messages in conversations:
        ignored += _unread_keys(template, messages, context)
    entries = [f"ignored: {what}" for what in ignored]
    return tuple(dict.fromkeys([*entries, *(entry for answer in answers for entry in answer.status)]))


def _is_rendered(
    template: ChatTemplate, prompt: str, messages: Sequence[Message], index: int, context: Context
) -> bool:
    """Whether the content of a message is in the prompt, unchanged or reformatted by the template."""
    texts = [text.strip() for text in messages[index]["content"].split(IMAGE)]
    # Other messages may have the same text.
    counts = [sum(message["content"].count(text) for message in messages) for text in texts]
    written = [max(map(prompt.count, (text, json.dumps(text, ensure_ascii=False)[1:-1]))) for text in texts]
    if all(count >= needed for count, needed in zip(written, counts, strict=True)):
        return True
    return template.renders(_replaced(messages, index, {**messages[index], "content": SENTINEL}), [SENTINEL], context)


def _unread_keys(template: ChatTemplate, messages: Sequence[Message], context: Context) -> Iterator[str]:
    """Yield unusual message keys that do not affect the rendered text."""
    for index, message in enumerate(messages):
        for key, value in message.items():
            if key in _USUAL_KEYS or value in ("", [], {}):
                continue
            without = _replaced(messages, index, {name: item for name, item in message.items() if name != key})
            try:
                unread = template.render(without, context) == template.render(messages, context)
            except BadRow:
                unread = False
            if unread:
                yield f"message key {key!r}, which the chat template never reads"


def _replaced(messages: Sequence[Message], index: int, message: Message) -> list[Message]:
    return [*messages[:index], message, *messages[index + 1 :]]
