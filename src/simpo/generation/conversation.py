"""A conversation with a model, its answers shown while they are generated."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from simpo.data.encoding import Encoder
from simpo.data.formats import Comparison
from simpo.data.messages import Message
from simpo.data.settings import RenderSettings
from simpo.data.templates import Renderer
from simpo.errors import SimpoError
from simpo.generation.engine import ResponseText, TransformersEngine
from simpo.generation.settings import SamplingSettings
from simpo.models.checkpoint import Checkpoint
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments

Write = Callable[[str], None]

# What a decoder makes of bytes that are not yet a whole character.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Reply:
    """What became of a message.

    Attributes:
        text: the answer, which is part of the conversation now; None if the message could not be answered.
        note: why it is not whole, in words; None if the model ended it.
    """

    text: str | None
    note: str | None = None


def load_conversation(
    model: ModelArguments,
    settings: SamplingSettings,
    *,
    chat_template: str | None = None,
    system: str | None = None,
    rendering: RenderSettings | None = None,
) -> Conversation:
    """A conversation with a model on disk or on the hub.

    Args:
        model: which.
        settings: how answers are drawn.
        chat_template: instead of the tokenizer's own; a template or the path of a file with one.
        system: see :class:`Conversation`.
        rendering: how the conversation is rendered.

    Raises:
        SimpoError: there is no such model, it has no chat template, or nothing ends its turns.
    """
    name = model.model_name_or_path
    tokenizer = load_tokenizer(name, model, chat_template=chat_template)
    if not tokenizer.chat_template:
        raise SimpoError(f"{name}: the tokenizer has no chat template; give one with chat_template (a text or a file)")
    checkpoint = Checkpoint.read(model)
    settings = settings.resolved(context=checkpoint.context, chunk_size=1)
    engine = TransformersEngine(checkpoint.load(), tokenizer)
    return Conversation(engine, tokenizer, settings, context=checkpoint.context, system=system, rendering=rendering)


class Conversation:
    """Turns of a user and a model.

    Args:
        engine: the model.
        tokenizer: its tokenizer, with a chat template.
        settings: how answers are drawn; resolved ones.
        context: positions that the model has; None if it has no bound.
        system: the system message that every conversation starts with.
        rendering: how the conversation is rendered.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        *,
        context: int | None,
        system: str | None = None,
        rendering: RenderSettings | None = None,
    ) -> None:
        self._engine, self._settings, self._context = engine, settings, context
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(tokenizer, self._encoder.literal, rendering)
        self._decoder = ResponseText(tokenizer)
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = list(self._opening)

    def answer(self, text: str, write: Write, stopped: Callable[[], bool]) -> Reply:
        """Answer a message.

        Args:
            text: the user's message.
            write: gets the answer piece by piece.
            stopped: asked after every token; the answer ends there if it says so.

        Raises:
            BadRow: the chat template refuses the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt_ids(messages)
        settings, full = self._settings, ""
        if self._context is not None:
            full = f"the model's context of {self._context:,} tokens is full; /reset starts a new conversation"
            room = self._context - len(prompt)
            if room < 1:
                return Reply(None, full)
            settings = dataclasses.replace(settings, max_new_tokens=min(room, self._settings.max_new_tokens or room))
        streamer = _Streamer(lambda ids: self._decoder.decode(prompt, ids), write)
        sampled = self._engine.stream(
            prompt,
            settings,
            secrets.randbits(63),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
        )
        reply = self._decoder.decode(prompt, sampled.ids)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        if sampled.finished:
            return Reply(reply)
        if stopped():
            return Reply(reply, "stopped")
        limit = settings.max_new_tokens
        return Reply(reply, full if limit != self._settings.max_new_tokens else f"stopped at max_new_tokens {limit:,}")

    def _prompt_ids(self, messages: list[Message]) -> list[int]:
        rendered = self._renderer.render(Comparison(messages, (), "the conversation"))
        return self._encoder.one_bos(self._encoder.encode_groups([rendered])[0][0])


class _Streamer(BaseStreamer):
    """Hands on the text of an answer as far as no later token can change it."""

    def __init__(self, decode: Callable[[list[int]], str], write: Write) -> None:
        self._decode, self._write = decode, write
        self._ids: list[int] | None = None  # None until the prompt has gone by
        self._shown = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token after the other."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if not text.endswith(_INCOMPLETE):
            self._show(text)

    def end(self) -> None:
        """Show what is left."""
        self._show(self._decode(self._ids or []))

    def _show(self, text: str) -> None:
        self._write(text[self._shown :])
        self._shown = max(self._shown, len(text))


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.new_full((len(input_ids),), self._stopped()).bool()
