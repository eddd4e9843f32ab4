"""Talk with a model in the terminal; /reset starts over, /exit or Ctrl-D ends.

examples:
  simpo chat outputs/simpo
  simpo chat org/model --system "Answer in one sentence." --temperature 0
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from simpo.cli._shared import LOADING
from simpo.config import parse_settings
from simpo.data.rows import BadRow
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.generation.conversation import Conversation, load_conversation
from simpo.generation.settings import SamplingSettings
from simpo.models.settings import ModelArguments
from simpo.runs.signals import noted
from simpo.runs.terminal import printable

_RESET, _EXIT = "/reset", "/exit"


@dataclass(kw_only=True)
class ChatSettings:
    """The conversation."""

    model: ModelArguments = field(metadata={"only": LOADING})
    system: str | None = field(default=None, metadata={"help": "System message."})
    sampling: SamplingSettings = field(metadata={"only": ("temperature", "top_p", "max_new_tokens")})
    chat_template: str | None = field(
        default=None, metadata={"help": "Chat template, or a file with one (default: the tokenizer's own)."}
    )
    rendering: RenderSettings


def main(argv: list[str]) -> int:
    """Read messages line by line and answer them until the input ends."""
    (settings,) = parse_settings(argv, (ChatSettings,), command="chat", about=__doc__)
    conversation = load_conversation(
        settings.model,
        settings.sampling,
        chat_template=settings.chat_template,
        system=settings.system,
        rendering=settings.rendering,
    )
    print(f"{_RESET} starts a new conversation, {_EXIT} or Ctrl-D ends, Ctrl-C stops an answer")
    for text in _messages():
        if text == _RESET:
            conversation.reset()
            print("[new conversation]")
        elif text:
            _answer(conversation, text)
    return 0


def _messages() -> Iterator[str]:
    """What the user enters, until the input or the conversation ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        if text == _EXIT:
            return
        yield text


def _answer(conversation: Conversation, text: str) -> None:
    with noted(signal.SIGINT) as interrupted:
        try:
            reply = conversation.answer(text, _show, lambda: bool(interrupted))
        except BadRow as bad:
            raise SimpoError(f"{bad.reason}; set chat_template to one that takes such a conversation") from bad
    if reply.text is not None:
        print()
    if reply.note:
        print(f"[{reply.note}]")


def _show(piece: str) -> None:
    # Tabs are common in code; spaces do not depend on the terminal.
    print(printable(piece.replace("\t", "    ")), end="", flush=True)
