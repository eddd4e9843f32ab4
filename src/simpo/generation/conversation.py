"""Multi-turn chat with a model, streaming its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from simpo.data.encoding import Encoder
from simpo.data.formats import Comparison
from simpo.data.messages import Message
from simpo.data.rendering import Renderer
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.generation.engine import TransformersEngine
from simpo.generation.responses import ResponseText
from simpo.generation.settings import SamplingSettings
from simpo.models.checkpoint import Checkpoint
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments

Write = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """The model's reply to one message."""

    text: str | None  # the answer, now part of the conversation; None if the context had no room for one
    note: str | None = None  # why the answer is incomplete or missing; None if the model finished it


def load_conversation(
    model: ModelArguments,
    settings: SamplingSettings,
    *,
    chat_template: str | None = None,
    system: str | None = None,
    rendering: RenderSettings | None = None,
) -> Conversation:
    """Load a model from disk or the hub and start a conversation with it."""
    name = model.model_name_or_path
    tokenizer = load_tokenizer(model, chat_template=chat_template)
    if not tokenizer.chat_template:
        raise SimpoError(f"{name}: the tokenizer has no chat template; set chat_template to a template or a file")
    checkpoint = Checkpoint.read(model)
    settings = settings.resolved(context=checkpoint.context, chunk_size=1)
    engine = TransformersEngine(checkpoint.load(), tokenizer)
    return Conversation(engine, tokenizer, settings, context=checkpoint.context, system=system, rendering=rendering)


class Conversation:
    """A conversation between a user and a model.

    ``settings`` are resolved, ``context`` is the model's maximum number of positions (None if unlimited), and
    ``system`` is the system message, if any.
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
        """Start over, keeping only the system message."""
        self.messages = list(self._opening)

    def answer(self, text: str, seed: int, write: Write, stopped: Callable[[], bool]) -> Reply:
        """Answer a message, given as ``text``.

        ``write`` receives the answer in pieces as it is generated. ``stopped`` is polled after every token and ends the
        answer when it returns True.

        Raises:
            BadRow: the chat template rejects the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._renderer.render(Comparison(messages, (), "the conversation"))
        prompt = self._encoder.with_one_bos(self._encoder.encode_groups([(rendered.texts, rendered.marker)])[0][0])
        settings, full = self._settings, ""
        if self._context is not None:
            full = f"the model's context of {self._context:,} tokens is full; /reset starts a new conversation"
            room = self._context - len(prompt)
            if room < 1:
                return Reply(None, full)
            settings = dataclasses.replace(settings, max_new_tokens=min(room, self._settings.max_new_tokens or room))
        sampled = self._engine.stream(
            prompt,
            settings,
            seed,
            streamer=_Streamer(lambda ids: self._decoder.decode(prompt, ids), write),
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


class _Streamer(BaseStreamer):
    """Writes text as soon as no later token can change it.

    transformers' TextStreamer decodes each line on its own, without the prompt, and keeps either all special tokens or
    none, which would lose leading spaces or thinking tags.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Write) -> None:
        self._decode, self._write = decode, write
        self._ids: list[int] | None = None  # None until the prompt has been passed
        self._shown = 0

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if not text.endswith("\ufffd"):  # the decoder's placeholder for an incomplete character
            self._show(text)

    def end(self) -> None:
        """Write the rest."""
        self._show(self._decode(self._ids or []))

    def _show(self, text: str) -> None:
        self._write(text[self._shown :])
        self._shown = max(self._shown, len(text))


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.new_full((len(input_ids),), self._stopped()).bool()
