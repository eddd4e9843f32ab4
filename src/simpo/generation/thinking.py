"""Reasoning that a model writes before its answer: ``<think>`` blocks, and their equivalents in other model families.

A server with a reasoning parser removes it from the message. Other servers, and sampling, leave it in.
"""

from __future__ import annotations

import re

_NAMES = ("think", "thinking", "thought", "reasoning", "seed:think")
# Patterns for the beginning and the end of thinking; they contain no groups, because they are combined below.
_PAIRS = (
    *((rf"(?i:<{name}\s*>)", rf"(?i:</{name}\s*>)") for name in _NAMES),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|channel>thought", r"<channel\|>"),
    # The channels of gpt-oss, and what remains of them after a decoder has dropped the special tokens.
    (
        r"(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)(?:(?!<\|message\|>).)*<\|message\|>",
        r"(?:<\|start\|>assistant)?<\|channel\|>final(?:(?!<\|message\|>).)*<\|message\|>",
    ),
    (r"\A\s*analysis(?=[A-Z])", r"assistantfinal(?=\S)"),
)
_MARKS = re.compile(
    "|".join(f"(?P<open{i}>{begin})|(?P<close{i}>{end})" for i, (begin, end) in enumerate(_PAIRS)), re.DOTALL
)
_TURN_END = re.compile(r"<\|(?:end|return)\|>\s*\Z")
# Special tokens that are only a part of a mark.
_PARTS = ("<|channel|>", "<|message|>", "<|channel>")


def after_thinking(text: str) -> str | None:
    """The part of a reply after its last end of thinking; None if the reply ends before its thinking does.

    An end counts without a beginning, because a chat template may have written that. A beginning counts anywhere in the
    text, so that nothing that may be thinking, or was written before it, is read as a verdict.
    """
    start, inside = 0, None
    for mark in _MARKS.finditer(text):
        kind = str(mark.lastgroup)
        if inside is None and kind.startswith("open"):
            inside = kind
        elif inside is None or kind == inside.replace("open", "close"):
            start, inside = mark.end(), None
    return None if inside is not None else _TURN_END.sub("", text[start:])


def split_thinking(text: str) -> tuple[str, str]:
    """The thinking at the beginning of an answer, which may be empty, and the rest.

    An answer that ends before its thinking does is all thinking. Marks further on belong to the answer, which may be
    about such marks.
    """
    mark = _MARKS.search(text)
    opening = mark is not None and str(mark.lastgroup).startswith("open")
    if mark is None or (opening and text[: mark.start()].strip()):
        return "", text
    if opening:
        wanted = str(mark.lastgroup).replace("open", "close")
        mark = next((other for other in _MARKS.finditer(text, mark.end()) if other.lastgroup == wanted), None)
    return (text, "") if mark is None else (text[: mark.end()], _TURN_END.sub("", text[mark.end() :]).lstrip())


def marks_thinking(token: str) -> bool:
    """Whether a special token is a mark of thinking or part of one."""
    return token in _PARTS or _MARKS.fullmatch(token) is not None
