"""Texts that a chat template has rendered already, which must not be rendered again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from simpo.data.messages import is_transcript, is_whole_transcript
from simpo.data.rows import BadRow

# How the turns of the common families of templates begin: ChatML, Llama 2 and 3, Gemma, Phi, DeepSeek, Command R, GLM,
# gpt-oss, Nemotron. A lone <s> may be HTML.
_OPENING = re.compile(
    r"\s*(<s>\s*|<bos>\s*|\[gMASK\]\s*|<sop>\s*)*"
    r"(<\|im_start\|>\s*\w|<\|start_header_id\|>|<\|header_start\|>|\[INST\]|<start_of_turn>|<\|turn>"
    r"|<\|(user|system|assistant)\|>|<\|begin_of_text\|>|<\uff5c(begin\u2581of\u2581sentence|User|Assistant)\uff5c>"
    r"|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|start\|>\w|<\|start_of_role\|>|<extra_id_[01]>|<bos>)"
)
_WAITING = re.compile(r"(\n\s*(### ?)?Assistant:|### Response:|\bASSISTANT:)\s*\Z")
_CUE = re.compile(r"\n\s*Assistant:")
_USER = "\ue000user\ue000"
_COLUMNS = ("prompt", "chosen", "rejected", "completion", "responses", "messages")


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """What a tokenizer's template writes before and after a user's message that is to be answered."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _USER}], tokenize=False, add_generation_prompt=True
        )
    except TemplateError:
        return None
    before, found, after = text.partition(_USER)
    before = before.removeprefix(tokenizer.bos_token or "").strip()
    return (before, after.strip()) if found and before and after.strip() else None


def check_not_rendered(row: Mapping[str, Any], frame: tuple[str, str] | None = None) -> None:
    """Look for texts of a row that begin as rendered turns do, or that ``frame`` (see :func:`frame_of`) surrounds.

    Raises:
        BadRow: there is one.
    """
    for name in _COLUMNS:
        for text in _texts(row.get(name)):
            framed = frame is not None and frame[0] in text and text.rstrip().endswith(frame[1])
            # A transcript that starts with something else, such as instructions, is not split into its turns.
            unsplit = name == "prompt" and _WAITING.search(text) and not is_transcript(text)
            if row.get("prompt") is None and text is row[name] and _CUE.search(text):
                unsplit = not is_whole_transcript(text)
            if framed or unsplit or _OPENING.match(text):
                raise BadRow(
                    f"{name} is rendered with a chat template already: give the plain text or messages, or set "
                    "chat_template: none"
                )


def _texts(value: Any) -> Iterator[str]:
    """The text of a cell, or of its messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        yield from _texts(value.get("content", value.get("text")))
