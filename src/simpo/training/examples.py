"""Examples for a run's report: held-out rows as text, with the log-probability of every token before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from simpo.data.images import text_tokenizer
from simpo.packing.model import policy_logprobs
from simpo.runs.lines import write_lines
from simpo.runs.manifest import write_digest
from simpo.training.packed import PackedTrainer

_EXAMPLES = 100  # rows, so that a large held-out set costs no second pass over it
_CONTEXT = 8  # ids in front of a token that decoding needs to treat it as a continuation
_UNFINISHED = "\ufffd"  # the decoding of an incomplete character


def write_examples(path: Path, trainer: PackedTrainer) -> None:
    """Write a seeded sample of the held-out rows as JSON lines, under the weights as they are; all ranks call.

    A line has the number of its row, ``where`` it is from, the ``prompt``, and for every response the ``texts`` of its
    tokens with their ``logps`` in nats, null for tokens that are not scored. Reward models have no ``logps``.
    """
    rows: Any = trainer.completed(trainer.eval_dataset)
    count = min(len(rows), _EXAMPLES)
    chosen = sorted(np.random.default_rng(trainer.args.seed).permutation(len(rows))[:count].tolist())
    rows = rows.select(chosen)
    logps = iter(()) if trainer.pipeline != "text-generation" else iter(_logps(trainer, rows))
    tokenizer = text_tokenizer(trainer.processing_class)
    if trainer.is_world_process_zero() and isinstance(tokenizer, PreTrainedTokenizerBase):
        decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        image = getattr(trainer.model.config, "image_token_id", None)
        shown = (row | {"prompt_ids": _without_repeats(row["prompt_ids"], image)} for row in rows)
        write_lines(path, (_line(row, number, decode, logps) for row, number in zip(shown, chosen, strict=True)))
        write_digest(path)


def _without_repeats(ids: list[int], image: int | None) -> list[int]:
    """Ids with a single token in place of each run of images' tokens."""
    return ids[:1] + [token for before, token in pairwise(ids) if token != image or before != image]


def _logps(trainer: PackedTrainer, rows: Any) -> list[float]:
    masks = rows["scored"] if "scored" in rows.column_names else rows["response_ids"]
    scored = "scored" in rows.column_names
    counts = np.array([sum(sum(mask) if scored else len(mask) for mask in several) for several in masks])
    return trainer.compute_for_responses(
        rows, lambda batch: policy_logprobs(trainer.model, batch, path=trainer.path), counts
    ).tolist()


def _line(row: dict[str, Any], number: int, decode: Callable[[Any], str], logps: Iterator[float]) -> dict[str, Any]:
    responses = []
    for place, ids in enumerate(row["response_ids"]):
        mask = row["scored"][place] if "scored" in row else [True] * len(ids)
        found = list(islice(logps, sum(mask)))
        response: dict[str, Any] = {"texts": token_texts(decode, ids)}
        if found:
            each = iter(found)
            response["logps"] = [round(next(each), 4) if scored else None for scored in mask]
        responses.append(response)
    kept = {key: row[key] for key in ("scores", "label") if row.get(key) is not None}
    extra = json.loads(row.get("extra") or "{}")
    return {
        **{"row": number, "where": row.get("where"), "prompt": decode(row["prompt_ids"]), "responses": responses},
        **kept,
        **({"id": extra["id"]} if "id" in extra else {}),
    }


def token_texts(decode: Callable[[Any], str], ids: Sequence[int]) -> list[str]:
    """The text of every token; a character of several tokens is the text of its last, and the others have none."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        context = list(ids[max(0, start - _CONTEXT) : start])
        text = decode([*context, *ids[start:end]])[len(decode(context)) :]
        if text.endswith(_UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts
