"""Figures of a prepared data set that say what a model would learn from it, wanted or not."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.data.report import DataReport
from simpo.data.settings import TokenizeSettings
from simpo.data.tokenize import Prepared, end_token_id
from simpo.results import Metric

PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}


@dataclass(frozen=True)
class Inspection:
    """Figures of one data set, over the rows that are used. Of a ranking, ``chosen`` is the best response and
    ``rejected`` the last; single responses (conversations, feedback) have one part ``response``.

    Attributes:
        report: what became of every row.
        lengths: ``prompt``, ``chosen`` and ``rejected``, or ``response`` -> percentile -> tokens.
        longer: share of comparisons whose chosen response has more tokens; ``None`` of single responses.
        ties: share whose responses have as many; ``None`` of single responses.
        repeated: comparisons that occurred before, prompt and responses.
        repeated_prompts: comparisons whose prompt occurred before.
        identical: pairs with equal responses, those included that were bad rows for it.
        one_bos: share of prompts with exactly one BOS, at the front; ``None`` if the model has no BOS.
        ended: share of responses that end with a token that ends a turn and hold it once.
    """

    report: DataReport
    lengths: dict[str, dict[str, int]]
    longer: float | None
    ties: float | None
    repeated: int
    repeated_prompts: int
    identical: int
    one_bos: float | None
    ended: float

    def metrics(self) -> list[Metric]:
        """All figures for the results, the report's included."""
        count = self.report.used
        prefix = f"data/{self.report.label}"
        shares = {"chosen_longer": self.longer, "ties": self.ties, "one_bos": self.one_bos, "ended": self.ended}
        counts = {"repeated": self.repeated, "repeated_prompts": self.repeated_prompts, "identical": self.identical}
        metrics = [Metric(name, value) for name, value in self.report.metrics()]
        metrics += [
            Metric(f"{prefix}/tokens/{part}/{name}", value, n=count)
            for part, values in self.lengths.items()
            for name, value in values.items()
        ]
        return metrics + [Metric(f"{prefix}/{name}", value, n=count) for name, value in (shares | counts).items()]


def inspect_prepared(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> Inspection:
    """Measure a prepared data set.

    Args:
        prepared: as :func:`simpo.data.tokenize.prepare` gave it.
        tokenizer: the one it was prepared with.
        settings: those it was prepared with.
    """
    # Calls of tools may end with another token than text does.
    ends = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    measured = _Measures(bos=tokenizer.bos_token_id, ends=ends | {end_token_id(tokenizer, settings)})
    columns = prepared.dataset.select_columns(["prompt_ids", "response_ids"])
    for batch in columns.iter(batch_size=1000):
        for prompt, responses in zip(batch["prompt_ids"], batch["response_ids"], strict=True):
            measured.add(prompt, responses)
    known_rows, known_prompts = map(set, zip(*_digests(prepared.dataset), strict=True))
    return measured.result(prepared.report, different=len(known_rows), prompts=len(known_prompts))


def shared_rows(train: Dataset, held_out: Dataset) -> tuple[int, int]:
    """Number of tokenized held-out rows that are training rows, and of those whose prompt is a training prompt."""
    known_rows, known_prompts = map(set, zip(*_digests(train), strict=True))
    found = list(_digests(held_out))
    return sum(row in known_rows for row, _ in found), sum(prompt in known_prompts for _, prompt in found)


def _digests(rows: Dataset) -> Iterator[tuple[bytes, bytes]]:
    """Of every row, prompt with responses and the prompt; through Arrow, because training data may be large."""
    for batch in rows.with_format("arrow").select_columns(["prompt_ids", "response_ids"]).iter(batch_size=1000):
        for prompt, responses in zip(batch["prompt_ids"], batch["response_ids"], strict=True):
            digests = []
            digest = hashlib.blake2b(digest_size=16)
            for ids in (prompt, *responses.values):
                digest.update(ids.values.to_numpy().astype(np.int64).tobytes() + b"|")
                digests.append(digest.digest())
            yield digests[-1], digests[0]


@dataclass(frozen=True)
class Example:
    """A comparison as the model reads it.

    Attributes:
        where: where its row comes from.
        prompt: text of the prompt, special tokens included.
        responses: text of each response.
        spans: of a conversation, the pieces of its response, and whether they are scored; of others all is.
    """

    where: str
    prompt: str
    responses: list[str]
    spans: tuple[tuple[str, bool], ...] = ()


def examples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count: int = 3) -> list[Example]:
    """The decoded first comparison, the last and others evenly between them."""
    indices = sorted(set(np.linspace(0, len(dataset) - 1, count).astype(int).tolist()))
    return [_example(dataset[index], f"row {index}", tokenizer) for index in indices]


def _example(row: dict, position: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    prompt = text(row["prompt_ids"])
    # In its context, because a decoder may strip the space that a response starts with.
    responses = [text(row["prompt_ids"] + ids)[len(prompt) :] for ids in row["response_ids"]]
    spans, before = [], row["prompt_ids"]
    scored_ids = zip(row["response_ids"][0], row["scored"][0], strict=True) if row.get("scored") else ()
    for scored, run in groupby(scored_ids, key=itemgetter(1)):
        after = before + [token_id for token_id, _ in run]
        spans.append((text(after)[len(text(before)) :], scored))
        before = after
    # Data that the user tokenized need not say where its rows come from.
    return Example(row.get("where", position), prompt, responses, tuple(spans))


class _Measures:
    """Collects the figures in one pass."""

    def __init__(self, *, bos: int | None, ends: set[int]) -> None:
        self._bos, self._ends = bos, ends
        self._lengths: dict[str, list[int]] = defaultdict(list)
        self._identical = self._one_bos = self._ended = self._responses = 0

    def add(self, prompt: list[int], responses: list[list[int]]) -> None:
        single = len(responses) == 1
        parts = {"response": responses[0]} if single else {"chosen": responses[0], "rejected": responses[-1]}
        for part, ids in {"prompt": prompt, **parts}.items():
            self._lengths[part].append(len(ids))
        self._identical += len(set(map(tuple, responses))) < len(responses)
        self._one_bos += prompt[0] == self._bos and prompt.count(self._bos) == 1
        self._ended += sum(ids[-1] in self._ends and (single or ids.count(ids[-1]) == 1) for ids in responses)
        self._responses += len(responses)

    def result(self, report: DataReport, *, different: int, prompts: int) -> Inspection:
        count = len(self._lengths["prompt"])
        lengths = {part: np.array(values) for part, values in self._lengths.items()}
        chosen, rejected = lengths.get("chosen"), lengths.get("rejected")
        return Inspection(
            report=report,
            lengths={part: _percentiles(values) for part, values in lengths.items()},
            longer=None if chosen is None or rejected is None else float(np.mean(chosen > rejected)),
            ties=None if chosen is None or rejected is None else float(np.mean(chosen == rejected)),
            repeated=count - different,
            repeated_prompts=count - prompts,
            identical=self._identical + report.bad.get("identical responses", 0),
            one_bos=None if self._bos is None else self._one_bos / count,
            ended=self._ended / self._responses,
        )


def _percentiles(values: np.ndarray) -> dict[str, int]:
    """Percentiles that are lengths of some text, not means of two."""
    found = np.percentile(values, list(PERCENTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(PERCENTILES, found, strict=True)}
