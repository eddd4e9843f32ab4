"""Talk with a model in the terminal: simpo chat MODEL; /reset starts over, /exit or Ctrl-D ends"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator

from simpo.cli._rendering import add_rendering_options, rendering
from simpo.config.arguments import ArgumentParser
from simpo.data.rows import BadRow
from simpo.errors import SimpoError
from simpo.generation.conversation import Conversation, load_conversation
from simpo.generation.settings import SamplingSettings
from simpo.models.settings import ModelArguments
from simpo.runs.signals import noted
from simpo.runs.terminal import printable

_RESET, _EXIT = "/reset", "/exit"


def main(argv: list[str]) -> int:
    """Read messages line by line and answer them until the input ends."""
    arguments = _parser().parse_args(argv)
    given = {key: getattr(arguments, key) for key in ("temperature", "top_p", "max_new_tokens")}
    model = ModelArguments(
        arguments.model,
        model_revision=arguments.model_revision,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    conversation = load_conversation(
        model,
        SamplingSettings(**{key: value for key, value in given.items() if value is not None}),
        chat_template=arguments.chat_template,
        system=arguments.system,
        rendering=rendering(arguments),
    )
    print(f"{_RESET} starts a new conversation, {_EXIT} or Ctrl-D ends, Ctrl-C stops an answer")
    for text in _messages():
        if text == _RESET:
            conversation.reset()
            print("[new conversation]")
        elif text:
            _answer(conversation, text)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("chat", __doc__)
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of the model")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top_p", type=float, metavar="X", help="probability of what is drawn from (default 0.95)")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer in tokens (default 2048)")
    parser.add_argument(
        "--dtype", metavar="TYPE", help="type of the weights (default bfloat16 on an accelerator, float32 on a CPU)"
    )
    parser.add_argument("--chat_template", metavar="TEMPLATE", help="template, or file with one")
    add_rendering_options(parser)
    parser.add_argument("--model_revision", default="main", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_remote_code()
    return parser


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
