"""Rows to the text that a model reads: the tokenizer's chat template, or plain text without one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from simpo.data.conversations import Conversation
from simpo.data.encoding import LiteralText
from simpo.data.formats import Comparison, Response
from simpo.data.messages import Message
from simpo.data.rows import BadRow
from simpo.data.transcripts import is_transcript, turns
from simpo.errors import SimpoError

# Content that no template trims, splits or refuses, to see what a template writes after it.
_SENTINEL = "\ue000response\ue000"


@dataclass(frozen=True)
class EndOfTurn:
    """How a template ends the assistant's turn.

    Attributes:
        token_id: the token that ends a response.
        text: its text.
        tail: all text that the template writes after the content of a final assistant message.
        kept: the part of it before the end-of-turn token, which belongs to the response.
    """

    token_id: int
    text: str
    tail: str = ""
    kept: str = ""


@dataclass(frozen=True)
class Rendered:
    """Text of one comparison.

    Attributes:
        prompt: what generation would be fed.
        responses: what follows it in each conversation, without the end-of-turn token.
        marker: set if the messages hold special-token text, which then stands marked in the texts above
            (see :class:`simpo.data.encoding.LiteralText`).
    """

    prompt: str
    responses: tuple[str, ...]
    marker: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt, and each response after it."""
        return (self.prompt, *(self.prompt + response for response in self.responses))


@dataclass(frozen=True)
class RenderedTurns:
    """Text of one conversation with ``n`` answers that are learnt.

    Attributes:
        prompts: ``n`` texts, each what generation would be fed for an answer and the beginning of the next one.
        answers: what follows each, without the end-of-turn token.
        between: ``n - 1`` texts from the end-of-turn token of an answer to the next answer.
        marker: as of :class:`Rendered`.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    between: tuple[str, ...] = ()
    marker: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts, and the whole conversation without its last end-of-turn token."""
        return (*self.prompts, self.prompts[-1] + self.answers[-1])


class Renderer:
    """Renders comparisons and conversations for one tokenizer.

    Args:
        tokenizer: with a chat template, all rows are conversations; without one, all are text.
        literal: finds special-token text inside messages.
        paper: render as the paper's code did: the prompt without a generation prompt, and as response all
            the rest, assistant header and text after the end-of-turn token included.
        insert_system: put an empty system message first where there is none and the template knows one.

    Raises:
        SimpoError: the template does not render, or nothing ends a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        literal: LiteralText,
        *,
        paper: bool = False,
        insert_system: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._literal = literal
        self._paper = paper
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self._has_template = template is not None
        # The condition of the paper's code.
        self._insert_system = (
            insert_system and template is not None and ("system" in template or "<|im_start|>" in template)
        )
        self.end = end_of_turn(tokenizer)

    def render(self, comparison: Comparison) -> Rendered:
        """Render one comparison.

        Raises:
            BadRow: an empty response, or messages that the template refuses.
            SimpoError: messages without a template, or a prompt that is not a prefix of its conversation.
        """
        if not self._has_template:
            return self._as_text(comparison.prompt, comparison.responses, comparison.where)
        prompt, responses, marker = self._messages(comparison.prompt, comparison.responses)
        prompt_text = self._render(prompt, generation_prompt=not self._paper)
        texts = [self._render([*prompt, message]) for message in responses]
        rests = tuple(self._response(prompt_text, text, comparison.where) for text in texts)
        return Rendered(prompt_text, rests, marker)

    def render_turns(self, conversation: Conversation) -> RenderedTurns:
        """Render one conversation.

        Raises:
            BadRow: an empty answer, or messages that the template refuses.
            SimpoError: messages without a template, a prompt of an answer that is not a prefix of the conversation,
                or an answer but the last that does not end with the end-of-turn token.
        """
        where, completion = conversation.where, conversation.completion
        following = [completion] if isinstance(completion, str) else completion
        if not self._has_template:
            text = self._as_text(conversation.prompt, following, where)
            return RenderedTurns((text.prompt,), text.responses)
        opening, rest, marker = self._messages(conversation.prompt, following)
        messages = [*opening, *rest]
        answers = [i for i in range(len(opening), len(messages)) if messages[i]["role"] == "assistant"]
        prompts = [self._render(messages[:i], generation_prompt=True) for i in answers]
        whole = self._render(messages)
        for prompt in prompts:
            _check_prefix(prompt, whole, where)
        turns = [self._turn(after.removeprefix(prompt), where) for prompt, after in pairwise(prompts)]
        last = self._response(prompts[-1], whole, where)
        return RenderedTurns(
            tuple(prompts),
            (*(answer for answer, _ in turns), last),
            tuple(between for _, between in turns),
            marker,
        )

    def _as_text(self, prompt: str | list[Message], responses: Sequence[Response], where: str) -> Rendered:
        if not isinstance(prompt, str):
            raise SimpoError(
                f"{where}: a conversation, but the tokenizer has no chat template; "
                "set chat_template to one, or give strings"
            )
        return Rendered(prompt, tuple(self._bare(str(text)) for text in responses))

    def _messages(
        self, prompt: str | list[Message], rest: Sequence[Response]
    ) -> tuple[list[Message], list[Message], str | None]:
        """Messages of a prompt and of what follows it, special-token text marked, and the marker."""
        opening, messages = _conversation(prompt, rest)
        messages = [
            {**message, "content": self._bare(message["content"])} if message["role"] == "assistant" else message
            for message in messages
        ]
        marker = self._literal.marker_for([message["content"] for message in [*opening, *messages]])
        if marker:
            opening, messages = self._marked(opening, marker), self._marked(messages, marker)
        if self._insert_system and opening[0]["role"] != "system":
            opening = [{"role": "system", "content": ""}, *opening]
        return opening, messages, marker

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        try:
            return _render(self._tokenizer, messages, generation_prompt=generation_prompt)
        except TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from error

    def _bare(self, content: str) -> str:
        """A response without the end-of-turn text that it may carry already: it gets the token once."""
        while (stripped := content.rstrip()).endswith(self.end.text):
            content = stripped.removesuffix(self.end.text)
        if not content.strip():
            raise BadRow("empty response")
        return content

    def _marked(self, messages: list[Message], marker: str) -> list[Message]:
        return [{**message, "content": self._literal.mark(message["content"], marker)} for message in messages]

    def _turn(self, text: str, where: str) -> tuple[str, str]:
        """An answer within a conversation, and what stands between its end-of-turn token and the next answer."""
        answer, end, between = text.partition(self.end.text)
        if not end:
            raise SimpoError(
                f"{where}: the chat template does not end every answer of a conversation with {self.end.text!r}; "
                "set chat_template to one that does"
            )
        return answer, between

    def _response(self, prompt: str, conversation: str, where: str) -> str:
        _check_prefix(prompt, conversation, where)
        rest = conversation[len(prompt) :]
        if self._paper:
            return rest
        if not rest.endswith(self.end.tail):
            raise SimpoError(
                f"{where}: the chat template ends this conversation with {rest[-40:]!r} and others with "
                f"{self.end.tail!r}; set chat_template to one that ends every response alike"
            )
        return rest.removesuffix(self.end.tail) + self.end.kept


def _check_prefix(prompt: str, conversation: str, where: str) -> None:
    if conversation.startswith(prompt):
        return
    shared = len(os.path.commonprefix([prompt, conversation]))  # noqa: RUF071 - texts
    raise SimpoError(
        f"{where}: the chat template renders a prompt that is not the beginning of the rendered "
        f"conversation: {prompt[shared : shared + 40]!r} against "
        f"{conversation[shared : shared + 40]!r}; set chat_template to one that does"
    )


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
        position, _, text, token_id = min(found)
        return EndOfTurn(token_id, text, tail, tail[:position])
    if tokenizer.eos_token_id is None:
        raise SimpoError("the tokenizer has no EOS and its chat template ends no turn; set an eos_token")
    return EndOfTurn(tokenizer.eos_token_id, tokenizer.eos_token, tail)


def _tail(tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": _SENTINEL}]
    try:
        text = _render(tokenizer, messages)
    except TemplateError as error:
        raise SimpoError(f"the chat template refuses a user and an assistant message: {error}") from error
    if _SENTINEL not in text:
        raise SimpoError("the chat template leaves out the assistant's message; set chat_template to another")
    return text.rpartition(_SENTINEL)[2]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)


def _conversation(prompt: str | list[Message], rest: Sequence[Response]) -> tuple[list[Message], list[Message]]:
    """Messages of a prompt and of what follows it, whatever they are made of."""
    if not isinstance(prompt, str):
        return prompt, [message for message in rest if isinstance(message, dict)]
    texts = [str(text) for text in rest]
    if not is_transcript(prompt):
        return [{"role": "user", "content": prompt}], _assistant(texts)
    opening = turns(prompt)
    if opening[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user message")
    return opening, _assistant([text.strip() for text in texts])


def _assistant(texts: Sequence[str]) -> list[Message]:
    return [{"role": "assistant", "content": text} for text in texts]
