"""Responses as rows of a file, with all that is known of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from simpo.atomic import staged_files
from simpo.data.prompts import Prompt
from simpo.sampling.engine import Sampled
from simpo.sampling.texts import ResponseText


def response_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sampled]]
) -> list[list[str]]:
    """The responses to every prompt as texts."""
    decoder = ResponseText(tokenizer)
    return [
        [decoder.decode(prompt.ids, sampled.ids) for sampled in answers]
        for prompt, answers in zip(prompts, samples, strict=True)
    ]


def write_responses(
    path: Path, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Sampled]]
) -> None:
    """Write a JSON line a prompt; the file is whole or absent.

    Args:
        path: the file.
        prompts: what was asked.
        texts: the responses to every prompt.
        samples: the same as they were sampled.

    Raises:
        SimpoError: the disk is full or the folder cannot be written.
    """
    rows = (_row(*parts) for parts in zip(prompts, texts, samples, strict=True))
    with (
        staged_files(path.parent) as staged,
        (staged / path.name).open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(prompt: Prompt, texts: Sequence[str], answers: Sequence[Sampled]) -> Mapping[str, Any]:
    return {
        "id": prompt.id,
        "prompt": prompt.content,
        **prompt.context.columns,
        "responses": list(texts),
        "response_ids": [list(sampled.ids) for sampled in answers],
        "finished": [sampled.finished for sampled in answers],
        "logps": [sampled.logp for sampled in answers],
        "where": prompt.where,
        "extra": prompt.extra,
    }


def read_samples(rows: Sequence[Mapping[str, Any]]) -> list[list[Sampled]]:
    """The responses to every prompt as they were sampled, from the rows of such a file."""
    return [
        [Sampled(*parts) for parts in zip(row["response_ids"], row["finished"], row["logps"], strict=True)]
        for row in rows
    ]
