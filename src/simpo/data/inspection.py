"""Figures of a prepared data set that say what a model would learn from it, wanted or not."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Figures of one data set, over the comparisons that are used. Of a ranking, ``chosen`` is the best
    response and ``rejected`` the last.

    Attributes:
        report: what became of every row.
        lengths: ``prompt``, ``chosen`` and ``rejected`` -> percentile -> tokens.
        longer: share of comparisons whose chosen response has more tokens.
        ties: share whose responses have as many.
        repeated: comparisons that occurred before, prompt and responses.
        repeated_prompts: comparisons whose prompt occurred before.
        identical: pairs with equal responses, those included that were bad rows for it.
        one_bos: share of prompts with exactly one BOS, at the front; ``None`` if the model has no BOS.
        ended: share of responses that end with a token that ends a turn and hold it once.
        prompts: digest of every prompt.
    """

    report: DataReport
    lengths: dict[str, dict[str, int]]
    longer: float
    ties: float
    repeated: int
    repeated_prompts: int
    identical: int
    one_bos: float | None
    ended: float
    prompts: Sequence[bytes]

    def metrics(self) -> list[Metric]:
        """All figures for the results, the report's included."""
        count = self.report.used
        prefix = f"data/{self.report.label}"
        shares = {"chosen_longer": self.longer, "ties": self.ties, "one_bos": self.one_bos, "ended": self.ended}
        counts = {
            "repeated": self.repeated,
            "repeated_prompts": self.repeated_prompts,
            "identical": self.identical,
        }
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
    return measured.result(prepared.report)


def overlap(train: Inspection, test: Inspection) -> int:
    """Number of test comparisons whose prompt is a training prompt too."""
    known = set(train.prompts)
    return sum(prompt in known for prompt in test.prompts)


@dataclass(frozen=True)
class Example:
    """A comparison as the model reads it.

    Attributes:
        where: where its row comes from.
        prompt: text of the prompt, special tokens included.
        responses: text of each response; all of its tokens are scored.
    """

    where: str
    prompt: str
    responses: list[str]


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
    # Data that the user tokenized need not say where its rows come from.
    return Example(row.get("where", position), prompt, responses)


class _Measures:
    """Collects the figures in one pass."""

    def __init__(self, *, bos: int | None, ends: set[int]) -> None:
        self._bos, self._ends = bos, ends
        self._lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
        self._prompts: list[bytes] = []
        self._comparisons: set[bytes] = set()
        self._identical = self._one_bos = self._ended = self._responses = 0

    def add(self, prompt: list[int], responses: list[list[int]]) -> None:
        for part, ids in zip(self._lengths, (prompt, responses[0], responses[-1]), strict=True):
            self._lengths[part].append(len(ids))
        self._prompts.append(_digest(prompt))
        self._comparisons.add(_digest(prompt, *responses))
        self._identical += len(set(map(tuple, responses))) < len(responses)
        self._one_bos += prompt[0] == self._bos and prompt.count(self._bos) == 1
        self._ended += sum(ids[-1] in self._ends and ids.count(ids[-1]) == 1 for ids in responses)
        self._responses += len(responses)

    def result(self, report: DataReport) -> Inspection:
        count = len(self._prompts)
        lengths = {part: np.array(values) for part, values in self._lengths.items()}
        chosen, rejected = lengths["chosen"], lengths["rejected"]
        return Inspection(
            report=report,
            lengths={part: _percentiles(values) for part, values in lengths.items()},
            longer=float(np.mean(chosen > rejected)),
            ties=float(np.mean(chosen == rejected)),
            repeated=count - len(self._comparisons),
            repeated_prompts=count - len(set(self._prompts)),
            identical=self._identical + report.bad.get("identical responses", 0),
            one_bos=None if self._bos is None else self._one_bos / count,
            ended=self._ended / self._responses,
            prompts=self._prompts,
        )


def _percentiles(values: np.ndarray) -> dict[str, int]:
    """Percentiles that are lengths of some text, not means of two."""
    found = np.percentile(values, list(PERCENTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(PERCENTILES, found, strict=True)}


def _digest(*texts: list[int]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for ids in texts:
        # Ids are not negative, so -1 tells where one text ends.
        digest.update(array("i", [*ids, -1]).tobytes())
    return digest.digest()
