"""The assistant's turn in a rendered conversation: what generation has to produce, and the token that ends it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import SENTINEL, ChatTemplate, as_object
from simpo.data.messages import REASONING, Context, Message, split_reasoning
from simpo.data.rows import BadRow
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError

_TRIMMED = "white space around an answer, which the chat template drops"
_NO_PREFIX = (
    "the chat template renders a prompt that is not the beginning of the rendered conversation; "
    "set chat_template to one that does"
)
# What generation prompts may end with to open the reasoning; what closes it then, after some reasoning and after none.
_OPENINGS = {
    "<think>": ("\n</think>\n\n", "\n</think>\n\n"),
    "<|channel>thought": ("\n<channel|>", "<channel|>"),
}
_ENDED_REASONING = re.compile(
    "|".join(rf"(?:{re.escape(tag)}\s*)?{re.escape(end.strip())}\s*\Z" for tag, (end, _) in _OPENINGS.items())
)


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
class Answer:
    """What generation has to produce after a prompt, without the end-of-turn token, and the whole conversation."""

    prompt: str
    text: str
    end: EndOfTurn
    whole: str
    status: tuple[str, ...] = ()


class AnswerCutter:
    """Cuts answers out of rendered conversations.

    Args:
        template: renders.
        end: how it ends a turn.
        tokens: structural tokens with their ids, the longest first.
    """

    def __init__(self, template: ChatTemplate, end: EndOfTurn, tokens: Mapping[str, int]) -> None:
        self.template, self._end, self._tokens = template, end, tokens

    def answer(self, prompt: str, before: list[Message], message: Message, context: Context) -> Answer:
        """What generation has to produce after ``prompt``: the first form of the message that is rendered in full."""
        reasons: list[BadRow] = []
        for form in self._forms(message):
            try:
                whole = self.template.render([*before, form], context)
                text, end = self._ended(self._after(prompt, whole, before, form, context), before, form, context)
                status = self._check_whole(text, before, form, context)
            except BadRow as bad:
                reasons.append(bad)
            else:
                return Answer(prompt, text, end, whole, status)
        raise reasons[0]

    def as_paper(self, prompt: str, before: list[Message], message: Message, context: Context) -> Answer:
        """All that follows ``prompt``, as the paper's code had it."""
        whole = self.template.render([*before, message], context)
        if not whole.startswith(prompt):
            raise BadRow(_NO_PREFIX)
        text = whole[len(prompt) :]
        return Answer(prompt, text, self._end, whole, self._check_whole(text, before, message, context))

    def _forms(self, message: Message) -> Iterator[Message]:
        """The message, and with its reasoning where the template knows it."""
        yield message
        thought, content = split_reasoning(message)
        rest = {key: value for key, value in message.items() if key not in REASONING}
        if content != message["content"] or (thought and self.template.reasoning_key):
            yield {**rest, "content": content} | (
                {self.template.reasoning_key or REASONING[0]: thought} if thought else {}
            )
        if thought and "</think>" in self.template.source:
            yield {**rest, "content": f"<think>\n{thought}\n</think>\n\n{content}"}

    def _after(self, prompt: str, whole: str, before: list[Message], message: Message, context: Context) -> str:
        """The part of a whole conversation that follows its prompt.

        Where the prompt opens or closes the reasoning and the conversation's last turn is written without it, or where
        an earlier turn is written differently once it is answered, the prompt is no prefix of the conversation.
        """
        thought, _ = split_reasoning(message)
        closed = _ENDED_REASONING.search(prompt)
        if closed and thought:
            raise BadRow(
                "reasoning, but the prompt that generation is fed already ends it; set chat_template_kwargs: "
                "{enable_thinking: true} (some templates: {thinking: true}), or leave the reasoning out"
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
        # An earlier turn is rendered differently: what is shared with another answer to it ends in this turn.
        other = {key: value for key, value in message.items() if key not in (*REASONING, "tool_calls")}
        other |= {key: SENTINEL for key in REASONING if key in message}
        shared = os.path.commonprefix(  # noqa: RUF071 - texts
            [whole, self.template.render([*before, {**other, "content": SENTINEL}], context)]
        )
        asked = self.template.render(before, context)
        opening = header.removeprefix(asked)
        place = whole.rfind(opening, 0, len(shared))
        body = whole[place + len(opening) :]
        # The header that was found may be an earlier turn's: what follows this turn's is the same after any question.
        asking = [*before[:-1], {**before[-1], "content": SENTINEL}]
        if (
            opening == header
            or not opening.strip()
            or place < 0
            or not self.template.render([*asking, message], context).endswith(opening + body)
        ):
            raise BadRow(_NO_PREFIX)
        return body

    def _ended(self, rest: str, before: list[Message], message: Message, context: Context) -> tuple[str, EndOfTurn]:
        """An answer without what ends it, and what does: calls of tools may end with another token than text does."""
        tokens = self._last_tokens(rest)
        place = next((place for place, token in tokens if token == self._end.text), None)
        if place is not None:
            return rest[:place], self._end
        if self._end.text in self._end.tail and tokens and message.get("tool_calls"):
            place, token = tokens[-1]
            # What stands between two calls ends a call and not the turn.
            twice = {**message, "tool_calls": [*message["tool_calls"], *message["tool_calls"]]}
            try:
                more = self.template.render([*before, twice], context).count(token)
            except BadRow:
                more = 0
            if more <= self.template.render([*before, message], context).count(token):
                return rest[:place], EndOfTurn(self._tokens[token], token)
        return rest.removesuffix(self._end.tail), self._end

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
        thought, content = split_reasoning(message)
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
        if not self.template.renders_calls:
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
                f"\uf8ff{number}\uf8ff",
                {key: f"\uf8ff{number}-{i}\uf8ff" for i, key in enumerate(arguments)},
            )
            known.append({**call, "function": {**function, "name": name, "arguments": values}})
            wanted += [name, *values.values()]
        again = self.template.render([*before, {**message, "tool_calls": known}], context) if known else ""
        if not all(one in again for one in wanted):
            raise BadRow("the chat template does not render all tool calls of an answer")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """What ends a response: the first special token after a rendered response, else the tokenizer's EOS.

    Where the EOS directly follows that token in every turn, as in Command R7B's template, the EOS ends the response.

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
        eos = tokenizer.eos_token
        if eos and text + eos in tail and text + eos in _tail(tokenizer, {"role": "user", "content": "user"}):
            text, token_id = eos, tokenizer.eos_token_id
        return EndOfTurn(token_id, text, tail)
    if tokenizer.eos_token_id is None:
        raise SimpoError("the tokenizer has no EOS and its chat template ends no turn; set an eos_token")
    return EndOfTurn(tokenizer.eos_token_id, tokenizer.eos_token, tail)


def _tail(tokenizer: PreTrainedTokenizerBase, *following: Message) -> str:
    """What a template writes after the content of an assistant's message, which others may follow."""
    template = ChatTemplate(tokenizer, RenderSettings())
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": SENTINEL}]
    try:
        text = template.render([*messages, *following], Context())
    except BadRow as refused:
        raise SimpoError(f"a user and an assistant message: {refused.reason}") from refused
    if SENTINEL not in text:
        raise SimpoError("the chat template leaves out the assistant's message; set chat_template to another")
    return text.rpartition(SENTINEL)[2]
