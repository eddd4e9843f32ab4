"""Transcripts as in Anthropic's HH-RLHF: ``\\n\\nHuman: ... \\n\\nAssistant: ...`` (arXiv 2204.05862)."""

from __future__ import annotations

import os
import re

ASSISTANT_CUE = "\n\nAssistant:"
_HUMAN_CUE = "\n\nHuman:"
_CUE = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_transcripts(transcripts: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Split transcripts at their last shared assistant cue.

    Returns:
        The prompt, up to and including the cue, and what follows it in each transcript as it stands;
        ``None`` if they share no cue.
    """
    shared = os.path.commonprefix(list(transcripts))  # noqa: RUF071 - texts, not paths
    end = shared.rfind(ASSISTANT_CUE)
    if end < 0:
        return None
    end += len(ASSISTANT_CUE)
    return transcripts[0][:end], tuple(text[end:] for text in transcripts)


def is_transcript(prompt: str) -> bool:
    """Whether a prompt is a transcript that waits for the assistant."""
    return prompt.startswith(_HUMAN_CUE) and prompt.endswith(ASSISTANT_CUE)


def turns(prompt: str) -> list[dict[str, str]]:
    """Messages of a transcript prompt (see :func:`is_transcript`), the empty last turn excepted."""
    pieces = _CUE.split(prompt)
    messages = [
        {"role": _ROLES[name], "content": text.strip()} for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return messages[:-1]
