"""Commands that work on an existing model: simpo chat, merge and push."""

from __future__ import annotations

import io
import secrets
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from simpo.cli._shared import LOADING, read_settings
from simpo.config import parse_settings, required, setting
from simpo.data.rows import BadRow
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.generation.conversation import Conversation, load_conversation
from simpo.generation.settings import SamplingSettings
from simpo.models import hub
from simpo.models.merging import write_merged
from simpo.models.settings import ModelArguments
from simpo.runs.terminal import printable, record_signals

_RESET, _EXIT = "/reset", "/exit"


@dataclass(kw_only=True)
class ChatSettings:
    """Conversation."""

    model: ModelArguments = field(metadata={"only": LOADING})
    second_model: str | None = setting(
        None, "Second model to answer the same messages, with the same seeds.", positional="SECOND_MODEL"
    )
    system: str | None = setting(None, "System message.")
    sampling: SamplingSettings = field(metadata={"only": ("temperature", "top_p", "max_new_tokens")})
    chat_template: str | None = setting(None, "Chat template or a file with one (default: the tokenizer's own).")
    rendering: RenderSettings


def chat(argv: list[str]) -> None:
    """Chat with a model, or with two side by side; /reset starts over, /exit or Ctrl-D quits.

    examples:
      simpo chat outputs/sft outputs/simpo
      simpo chat org/model --system "Answer in one sentence." --temperature 0
    """
    (settings,) = parse_settings(argv, (ChatSettings,), command="chat", about=chat.__doc__)
    models = [settings.model]
    if settings.second_model is not None:
        models.append(replace(settings.model, model_name_or_path=settings.second_model))
    conversations = [
        load_conversation(
            model,
            settings.sampling,
            chat_template=settings.chat_template,
            system=settings.system,
            rendering=settings.rendering,
        )
        for model in models
    ]
    print(f"{_RESET} starts a new conversation, {_EXIT} or Ctrl-D quits, Ctrl-C interrupts an answer")
    for text in _messages():
        seed = secrets.randbits(63)
        for model, conversation in zip(models, conversations, strict=True):
            if text == _RESET:
                conversation.reset()
            elif text:
                if len(models) > 1:
                    print(f"[{printable(model.model_name_or_path)}]")
                _answer(conversation, text, seed)
        if text == _RESET:
            print("[new conversation]")


def _messages() -> Iterator[str]:
    """Yield the user's messages until the end of the input or /exit."""
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


def _answer(conversation: Conversation, text: str, seed: int) -> None:
    with record_signals(signal.SIGINT) as interrupted:
        try:
            reply = conversation.answer(text, seed, _print_piece, lambda: bool(interrupted))
        except BadRow as bad:
            raise SimpoError(f"{bad.reason}; set chat_template to one that supports this conversation") from bad
    if reply.text is not None:
        print()
    if reply.note:
        print(f"[{reply.note}]")


def _print_piece(piece: str) -> None:
    # Tabs are common in code, and printable() would escape them.
    print(printable(piece.replace("\t", "    ")), end="", flush=True)


@dataclass(kw_only=True)
class MergeSettings:
    """Adapter and output."""

    adapter: ModelArguments = field(
        metadata={"only": ("model_name_or_path", "model_revision", "trust_remote_code", "allow_pickle", "save_dtype")}
    )
    output_dir: Path = required("New folder for the merged model.")


def merge(argv: list[str]) -> None:
    """Merge an adapter into its base model.

    examples:
      simpo merge outputs/lora --output_dir outputs/merged
      simpo merge org/adapter --model_revision v2 --save_dtype bfloat16 --output_dir outputs/merged
    """
    settings = read_settings(merge, MergeSettings, argv)
    write_merged(settings.adapter, settings.output_dir)
    print(f"saved: {settings.output_dir}\nnext:  simpo chat {shlex.quote(str(settings.output_dir))}")


@dataclass(kw_only=True)
class PushSettings:
    """Run and repository."""

    run: Path = required("Folder of a finished run, or of any model.", positional="RUN")
    repo: str = required("Repository on the hub, as name/model.", positional="REPO")
    private: bool = setting(False, "If the repository is new, make it private.")
    include: list[str] = setting([], "Other files in the folder to upload, such as recipe.yaml.")
    dry_run: bool = setting(False, "Only list the files that would be uploaded.")


def push(argv: list[str]) -> None:
    """Upload the model of a finished run to the hub.

    examples:
      simpo push outputs/qwen3-simpo name/qwen3-simpo --dry_run
      simpo push outputs/qwen3-simpo name/qwen3-simpo --private --include recipe.yaml
    """
    settings = read_settings(push, PushSettings, argv)
    files = hub.files_to_push(settings.run, settings.include)
    for path in files:
        print(f"{path.stat().st_size:>15,}  {path.relative_to(settings.run)}")
    if settings.dry_run:
        print(f"dry run: nothing was uploaded to {settings.repo}")
        return
    url = hub.push(settings.run, settings.repo, files, private=settings.private, report=print)
    print(f"saved: {url}")
