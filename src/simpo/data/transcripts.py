"""Transcripts as in Anthropic's HH-RLHF: ``\\n\\nHuman: ... \\n\\nAssistant: ...`` (arXiv 2204.05862).

Other white space before the cues is accepted where the turns then alternate and with HH-RLHF's they do not.
"""

from __future__ import annotations

import os
import re

from simpo.data.rows import BadRow

_CUE = re.compile(r"\n\n(Human|Assistant):")
_LOOSE_CUE = re.compile(r"(?:\A|\n)\s*(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_transcripts(transcripts: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Split transcripts at their last shared assistant cue.

    Returns:
        The prompt, up to and including the cue, and what follows it in each transcript as it stands;
        ``None`` if they share no cue.

    Raises:
        BadRow: another turn of the human follows it.
    """
    shared = os.path.commonprefix(list(transcripts))  # noqa: RUF071 - texts, not paths
    ends = [cue.end() for cue in _cue_of(transcripts[0]).finditer(shared) if cue[1] == "Assistant"]
    if not ends:
        return None
    responses = tuple(text[ends[-1] :] for text in transcripts)
    if any(re.search(r"\n\s*Human:", response) for response in responses):
        raise BadRow("the transcripts differ in more than their last answer")
    return transcripts[0][: ends[-1]], responses


def is_transcript(prompt: str) -> bool:
    """Whether a prompt is a transcript that waits for the assistant."""
    return is_whole_transcript(prompt) and re.search(r"\n\s*Assistant:\s*\Z", prompt) is not None


def is_whole_transcript(text: str) -> bool:
    """Whether a text starts with a turn of the human and has one of the assistant."""
    return re.match(r"\s*Human:", text) is not None and re.search(r"\n\s*Assistant:", text) is not None


def turns(prompt: str) -> list[dict[str, str]]:
    """Messages of a transcript prompt (see :func:`is_transcript`), the empty last turn excepted."""
    pieces = _cue_of(prompt).split(prompt)
    messages = [
        {"role": _ROLES[name], "content": text.strip()} for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return messages[:-1]


def _cue_of(transcript: str) -> re.Pattern[str]:
    """How the turns of a transcript begin: as in HH-RLHF, unless only with other white space they alternate."""
    alternating = [cue for cue in (_CUE, _LOOSE_CUE) if _alternates(cue.split(transcript))]
    return alternating[0] if alternating else _CUE


def _alternates(pieces: list[str]) -> bool:
    names = pieces[1::2]
    expected = ["Human", "Assistant"] * len(names)
    return len(names) > 1 and not pieces[0].strip() and names == expected[: len(names)]
