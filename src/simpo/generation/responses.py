"""Sampled responses as texts, as rows of ``responses.jsonl``, and their metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import end_of_turn, render_messages
from simpo.data.images import IMAGES, as_text
from simpo.data.prompts import Prompt
from simpo.data.rows import BadRow
from simpo.errors import SimpoError
from simpo.generation.engine import Sampled
from simpo.runs.files import staged_files
from simpo.runs.results import Metric
from simpo.statistics import mean_interval, proportion_interval, share_interval

_CONTEXT = 8  # tokens of the prompt that make the decoder treat the response as a continuation
_SENTINEL = "\ue000response\ue000"


class ResponseText:
    """Decodes the responses of one tokenizer.

    Special tokens are left out, except those that mark thinking, which could not be told from the answer without them.
    White space that the chat template itself writes before and after a message is left out too: rendered with the
    template, the text gives the sampled tokens again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        end = end_of_turn(tokenizer)
        special = {one for one in tokenizer.all_special_ids if not marks_thinking(tokenizer.convert_ids_to_tokens(one))}
        self._special = special | {end.token_id}
        self._before, self._after = _written_before(tokenizer), end.response_suffix

    def decode(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text of the response ``ids`` to ``prompt``."""
        # Decoded after a part of the prompt, because some decoders strip a space at the start of a text.
        context = list(prompt[-_CONTEXT:])
        kept = [token_id for token_id in ids if token_id not in self._special]
        text = self._text(context + kept)[len(self._text(context)) :]
        return text.removeprefix(self._before).removesuffix(self._after)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _written_before(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the chat template writes between the generation prompt and the assistant's message."""
    if not tokenizer.chat_template:
        return ""
    user = {"role": "user", "content": "user"}
    try:
        prompt = render_messages(tokenizer, [user], add_generation_prompt=True)
        whole = render_messages(tokenizer, [user, {"role": "assistant", "content": _SENTINEL}])
    except BadRow as refused:
        raise SimpoError(f"a user and an assistant message: {refused.reason}") from refused
    return whole.removeprefix(prompt).partition(_SENTINEL)[0] if whole.startswith(prompt) else ""


def response_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sampled]]
) -> list[list[str]]:
    """The texts of the responses to every prompt."""
    decoder = ResponseText(tokenizer)
    return [
        [decoder.decode(prompt.ids, sampled.ids) for sampled in answers]
        for prompt, answers in zip(prompts, samples, strict=True)
    ]


def write_responses(
    path: Path, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Sampled]]
) -> None:
    """Write one JSON line per prompt with all its responses; the file is complete or absent."""
    with (
        staged_files(path.parent) as staged,
        (staged / path.name).open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for prompt, prompt_texts, answers in zip(prompts, texts, samples, strict=True):
            row = {
                "id": prompt.id,
                "prompt": prompt.content,
                **prompt.context.columns,
                **({IMAGES: [as_text(reference) for reference in prompt.images]} if prompt.images else {}),
                "responses": list(prompt_texts),
                "response_ids": [list(sampled.ids) for sampled in answers],
                "finished": [sampled.finished for sampled in answers],
                "logps": [sampled.logp for sampled in answers],
                "where": prompt.where,
                "extra": prompt.extra,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_samples(rows: Sequence[Mapping[str, Any]]) -> list[list[Sampled]]:
    """The sampled responses to every prompt, from the rows of such a file."""
    return [
        [Sampled(*parts) for parts in zip(row["response_ids"], row["finished"], row["logps"], strict=True)]
        for row in rows
    ]


def response_metrics(texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Sampled]]) -> list[Metric]:
    """Number, lengths and endings of the responses; every prompt has equally many.

    Answers to the same prompt are similar, so the intervals of lengths are those of the means per prompt.
    """
    ended = [sampled.finished for answers in samples for sampled in answers]
    tokens = [float(np.mean([len(sampled.ids) for sampled in answers])) for answers in samples]
    characters = [float(np.mean([len(text) for text in answers])) for answers in texts]
    metrics = [
        Metric("sample/prompts", len(samples)),
        Metric("sample/responses", len(ended)),
        Metric.of("sample/tokens", mean_interval(tokens)),
        Metric.of("sample/characters", mean_interval(characters)),
        Metric.of("sample/ended", proportion_interval(sum(ended), len(ended))),
        Metric("sample/hit_max_new_tokens", len(ended) - sum(ended), n=len(ended)),
    ]
    if len(texts[0]) > 1:
        distinct = [len(set(answers)) / len(answers) for answers in texts]
        metrics.append(Metric.of("sample/distinct", share_interval(distinct)))
    return metrics


# ---- Reasoning that a model writes before its answer: `<think>` blocks, and their equivalents in other families.


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
