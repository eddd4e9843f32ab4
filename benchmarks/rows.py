"""Comparisons as text, their tokenizers, and the token ids that every entrant gets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.packing.layout import TokenizedComparison

CUE = "\n\nAssistant:"
END = "<|endoftext|>"
DEFAULT_DATA = Path(__file__).parents[2] / "shared" / "data" / "preferences" / "hh_harmless_train.jsonl.gz"


@dataclass(frozen=True)
class Row:
    """A prompt and its responses, the best first; ``prompt + response`` is the transcript."""

    prompt: str
    responses: tuple[str, ...]


def read_pairs(path: Path) -> list[Row]:
    """Read HH-style transcripts (``.jsonl`` or ``.jsonl.gz``), splitting each pair at the last cue both share."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = map(json.loads, text.decode().splitlines())
    return [_cut(row["chosen"], row["rejected"]) for row in rows]


def _cut(chosen: str, rejected: str) -> Row:
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    end = chosen.rindex(CUE, 0, shared) + len(CUE)
    return Row(chosen[:end], (chosen[end:], rejected[end:]))


def byte_pair_tokenizer(rows: Sequence[Row], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer on the rows' text: at most ``vocabulary`` tokens, merges seen at least twice."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - slow import

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in (row.prompt, *row.responses)), trainer)
    return _fast(tokenizer)


def word_tokenizer(words: int) -> Any:
    """Return a tokenizer with one token per word of :func:`benchmarks.profiles.synthetic_rows`."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415 - slow import

    vocabulary = {END: 0} | {f"w{number}": number + 1 for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer)


def _fast(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - slow import

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def tokenize(row: Row, tokenizer: Any) -> TokenizedComparison:
    """Tokenize ``row``; every response ends with the end-of-text token."""
    prompt, *responses = tokenizer([row.prompt, *row.responses], add_special_tokens=False)["input_ids"]
    return TokenizedComparison(prompt, [[*response, tokenizer.eos_token_id] for response in responses])
