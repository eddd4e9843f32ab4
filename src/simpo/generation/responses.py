"""Decodes sampled responses, writes them to ``responses.jsonl``, and computes their metrics."""

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

_CONTEXT = 8  # prompt tokens decoded along with a response, so that it is decoded as a continuation
_SENTINEL = "\ue000response\ue000"


class ResponseText:
    """Decodes responses with one tokenizer.

    Special tokens are removed, except those that delimit thinking, which would otherwise look like part of the answer.
    White space that the chat template adds around a message is removed too, so that rendering the text with the
    template gives the sampled tokens again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        end = end_of_turn(tokenizer)
        special = {i for i in tokenizer.all_special_ids if not is_thinking_tag(tokenizer.convert_ids_to_tokens(i))}
        self._special = special | {end.token_id}
        self._before, self._after = _template_prefix(tokenizer), end.response_suffix

    def decode(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Decode the response ``ids`` to ``prompt``."""
        # Some decoders strip a leading space, so decode after the end of the prompt.
        context = list(prompt[-_CONTEXT:])
        visible = [token_id for token_id in ids if token_id not in self._special]
        text = self._text(context + visible)[len(self._text(context)) :]
        return text.removeprefix(self._before).removesuffix(self._after)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _template_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that the chat template inserts between the generation prompt and the assistant's message."""
    if not tokenizer.chat_template:
        return ""
    user = {"role": "user", "content": "user"}
    try:
        prompt = render_messages(tokenizer, [user], add_generation_prompt=True)
        whole = render_messages(tokenizer, [user, {"role": "assistant", "content": _SENTINEL}])
    except BadRow as refused:
        raise SimpoError(f"cannot render a user and an assistant message: {refused.reason}") from refused
    return whole.removeprefix(prompt).partition(_SENTINEL)[0] if whole.startswith(prompt) else ""


def response_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sampled]]
) -> list[list[str]]:
    """Decode the responses to every prompt."""
    decoder = ResponseText(tokenizer)
    return [
        [decoder.decode(prompt.ids, sampled.ids) for sampled in answers]
        for prompt, answers in zip(prompts, samples, strict=True)
    ]


def write_responses(
    path: Path, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Sampled]]
) -> None:
    """Write one JSON line per prompt with all its responses; the file is written completely or not at all."""
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
    """Return the sampled responses to every prompt, from the rows of a ``responses.jsonl``."""
    return [
        [Sampled(*parts) for parts in zip(row["response_ids"], row["finished"], row["logps"], strict=True)]
        for row in rows
    ]


def response_metrics(texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Sampled]]) -> list[Metric]:
    """Compute counts, lengths and end-of-turn rates; every prompt has the same number of responses.

    Answers to the same prompt are similar, so intervals for lengths treat each prompt's mean as one observation.
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


# ---- Thinking before an answer: `<think>` blocks and their equivalents in other model families.


_NAMES = ("think", "thinking", "thought", "reasoning", "seed:think")
# Patterns for the start and end of thinking. They contain no groups because they are combined below.
_PAIRS = (
    *((rf"(?i:<{name}\s*>)", rf"(?i:</{name}\s*>)") for name in _NAMES),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|channel>thought", r"<channel\|>"),
    # gpt-oss channels, and what is left of them once the special tokens have been stripped.
    (
        r"(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)(?:(?!<\|message\|>).)*<\|message\|>",
        r"(?:<\|start\|>assistant)?<\|channel\|>final(?:(?!<\|message\|>).)*<\|message\|>",
    ),
    (r"\A\s*analysis(?=[A-Z])", r"assistantfinal(?=\S)"),
)
_TAGS = re.compile(
    "|".join(f"(?P<open{i}>{begin})|(?P<close{i}>{end})" for i, (begin, end) in enumerate(_PAIRS)), re.DOTALL
)
_TURN_END = re.compile(r"<\|(?:end|return)\|>\s*\Z")
# Special tokens that form only part of a tag.
_PARTIAL_TAGS = ("<|channel|>", "<|message|>", "<|channel>")


def after_thinking(text: str) -> str | None:
    """Return the part of a reply after its last closing tag, or None if the reply ends while still thinking.

    A closing tag counts without an opening one, which the chat template may have written. An opening tag counts
    anywhere in the text, so that nothing that may be thinking, or precedes it, is read as a verdict.
    """
    start, inside = 0, None
    for tag in _TAGS.finditer(text):
        kind = str(tag.lastgroup)
        if inside is None and kind.startswith("open"):
            inside = kind
        elif inside is None or kind == inside.replace("open", "close"):
            start, inside = tag.end(), None
    return None if inside is not None else _TURN_END.sub("", text[start:])


def split_thinking(text: str) -> tuple[str, str]:
    """Split an answer into its leading thinking, which may be empty, and the rest.

    An answer that ends while still thinking is all thinking. Later tags are part of the answer, which may be about
    such tags.
    """
    tag = _TAGS.search(text)
    opening = tag is not None and str(tag.lastgroup).startswith("open")
    if tag is None or (opening and text[: tag.start()].strip()):
        return "", text
    if opening:
        wanted = str(tag.lastgroup).replace("open", "close")
        tag = next((other for other in _TAGS.finditer(text, tag.end()) if other.lastgroup == wanted), None)
    return (text, "") if tag is None else (text[: tag.end()], _TURN_END.sub("", text[tag.end() :]).lstrip())


def is_thinking_tag(token: str) -> bool:
    """Whether a special token is a thinking tag or part of one."""
    return token in _PARTIAL_TAGS or _TAGS.fullmatch(token) is not None
