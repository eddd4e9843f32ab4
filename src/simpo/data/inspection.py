"""Statistics for a tokenized dataset, and for sets of answers to the same prompt."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from operator import itemgetter

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.data.images import DIGESTS
from simpo.data.rows import DataReport
from simpo.data.settings import TokenizeSettings
from simpo.data.tokenizing import Prepared, end_token_id
from simpo.runs.results import Metric
from simpo.statistics import mean_interval, share_interval

PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}


@dataclass(frozen=True)
class Inspection:
    """Statistics for one dataset, over the rows that are used. In a ranking, ``chosen`` is the best response and
    ``rejected`` the worst; single responses (conversations, feedback) have just the part ``response``.
    """

    report: DataReport  # what happened to every row
    lengths: dict[str, dict[str, int]]  # `prompt`, `chosen` and `rejected`, or `response` -> percentile -> tokens
    longer: float | None  # fraction of comparisons whose chosen response has more tokens; None for single responses
    ties: float | None  # fraction of comparisons whose responses are equally long; None for single responses
    repeated: int  # comparisons that duplicate an earlier one, prompt and responses
    repeated_prompts: int  # comparisons whose prompt occurred before
    contradicted: int  # pairs that also occur in reverse, with the responses swapped
    identical: int  # pairs with equal responses, including those rejected as bad rows for it
    one_bos: float | None  # fraction of prompts with exactly one BOS, at the front; None if the model has no BOS
    ended: float  # fraction of responses that end with an end-of-turn token and contain it only once

    def metrics(self) -> list[Metric]:
        """Return all statistics as metrics, including those of the report."""
        count = self.report.used
        prefix = f"data/{self.report.label}"
        shares = {"chosen_longer": self.longer, "ties": self.ties, "one_bos": self.one_bos, "ended": self.ended}
        counts = {name: getattr(self, name) for name in ("repeated", "repeated_prompts", "contradicted", "identical")}
        metrics = [Metric(name, value) for name, value in self.report.metrics()]
        metrics += [
            Metric(f"{prefix}/tokens/{part}/{name}", value, n=count)
            for part, values in self.lengths.items()
            for name, value in values.items()
        ]
        return metrics + [Metric(f"{prefix}/{name}", value, n=count) for name, value in (shares | counts).items()]


def inspect_prepared(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> Inspection:
    """Compute the statistics of a dataset that was prepared with this tokenizer and these settings."""
    bos = tokenizer.bos_token_id
    # Tool calls may end with a different token than text does.
    ends = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends.add(end_token_id(tokenizer, settings))
    tokens: dict[str, list[int]] = defaultdict(list)
    identical = one_bos = ended = total = 0
    for batch in prepared.dataset.select_columns(["prompt_ids", "response_ids"]).iter(batch_size=1000):
        for prompt, responses in zip(batch["prompt_ids"], batch["response_ids"], strict=True):
            single = len(responses) == 1
            parts = {"response": responses[0]} if single else {"chosen": responses[0], "rejected": responses[-1]}
            for part, ids in {"prompt": prompt, **parts}.items():
                tokens[part].append(len(ids))
            identical += len(set(map(tuple, responses))) < len(responses)
            one_bos += prompt[0] == bos and prompt.count(bos) == 1
            ended += sum(ids[-1] in ends and (single or ids.count(ids[-1]) == 1) for ids in responses)
            total += len(responses)
    lengths = {part: np.array(values) for part, values in tokens.items()}
    chosen, rejected = lengths.get("chosen"), lengths.get("rejected")
    known_rows, known_prompts = map(set, zip(*_digests(prepared.dataset), strict=True))
    count = len(prepared.dataset)
    return Inspection(
        report=prepared.report,
        lengths={part: _percentiles(values) for part, values in lengths.items()},
        longer=None if chosen is None or rejected is None else float(np.mean(chosen > rejected)),
        ties=None if chosen is None or rejected is None else float(np.mean(chosen == rejected)),
        repeated=count - len(known_rows),
        repeated_prompts=count - len(known_prompts),
        contradicted=_contradicted(prepared.dataset, known_rows),
        identical=identical + prepared.report.bad.get("identical responses", 0),
        one_bos=None if bos is None else one_bos / count,
        ended=ended / total,
    )


def _percentiles(values: np.ndarray) -> dict[str, int]:
    """Return percentiles that are lengths of actual texts rather than interpolated ones."""
    percentiles = np.percentile(values, list(PERCENTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(PERCENTILES, percentiles, strict=True)}


def shared_rows(train: Dataset, held_out: Dataset) -> tuple[int, int]:
    """Count the tokenized held-out rows that are also training rows, and those whose prompt is a training prompt."""
    known_rows, known_prompts = map(set, zip(*_digests(train), strict=True))
    digests = list(_digests(held_out))
    return sum(row in known_rows for row, _ in digests), sum(prompt in known_prompts for _, prompt in digests)


def _digests(rows: Dataset) -> Iterator[tuple[bytes, bytes]]:
    """Yield the digests of each row (prompt and responses) and of its prompt alone, both including images."""
    for texts in _parts_of_rows(rows):
        yield _digest(texts), _digest(texts[:1])


def _contradicted(rows: Dataset, known: set[bytes]) -> int:
    """Count the pairs whose reverse is among the ``known`` row digests."""
    pairs = (texts for texts in _parts_of_rows(rows) if len(texts) == 3 and texts[1] != texts[2])
    return sum(_digest([prompt, rejected, chosen]) in known for prompt, chosen, rejected in pairs)


def _parts_of_rows(rows: Dataset) -> Iterator[list[bytes]]:
    """Yield each row's prompt and responses as the bytes of their ids; image digests precede the prompt's.

    Reads through Arrow, because datasets may be large.
    """
    columns = [name for name in ("prompt_ids", "response_ids", DIGESTS) if name in rows.column_names]
    for batch in rows.with_format("arrow").select_columns(columns).iter(batch_size=1000):
        images = batch[DIGESTS].to_pylist() if DIGESTS in columns else [None] * len(batch)
        for prompt, responses, image_digests in zip(batch["prompt_ids"], batch["response_ids"], images, strict=True):
            texts = [ids.values.to_numpy().astype(np.int64).tobytes() for ids in (prompt, *responses.values)]
            yield ["".join(image_digests or ()).encode() + texts[0], *texts[1:]]


def _digest(texts: Sequence[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(text + b"|" for text in texts), digest_size=16).digest()


@dataclass(frozen=True)
class Example:
    """A comparison as the model reads it."""

    where: str  # where its row comes from
    prompt: str  # text of the prompt, special tokens included
    responses: list[list[tuple[str, bool]]]  # for each response, pieces of its text and whether they are scored


def examples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Decode the first, the middle and the last comparison."""
    indices = sorted({0, (len(dataset) - 1) // 2, len(dataset) - 1})
    return [_example(dataset[index], f"row {index}", tokenizer) for index in indices]


def _example(row: dict, position: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def pieces(response: list[int], marks: list[bool]) -> Iterator[tuple[str, bool]]:
        before = row["prompt_ids"]  # decoded along, because a decoder may strip the space at the start of a text
        for scored, run in groupby(zip(response, marks, strict=True), key=itemgetter(1)):
            after = before + [token_id for token_id, _ in run]
            yield text(after)[len(text(before)) :], scored
            before = after

    all_marks = row.get("scored") or [[True] * len(ids) for ids in row["response_ids"]]
    responses = [list(pieces(*both)) for both in zip(row["response_ids"], all_marks, strict=True)]
    # Data tokenized by the user may not name the source of its rows.
    return Example(row.get("where", position), text(row["prompt_ids"]), responses)


# ---- Several answers to one prompt: how diverse they are, how their scores are distributed, and whether length wins.

SCORE_PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}
_SHARES = ("distinct_answers", "distinct_2", "overlap", "longer_wins")


@dataclass(frozen=True)
class AnswerSet:
    """The answers to one prompt."""

    responses: Sequence[str]  # their texts
    # One score per answer, higher is better, None for an answer without one; None if no answer has one.
    scores: Sequence[float | None] | None = None

    def scored(self) -> list[tuple[str, float]]:
        """Return the answers that have a score, together with it."""
        pairs = zip(self.responses, self.scores or (), strict=False)
        return [(text, score) for text, score in pairs if score is not None]


def distinct_ngrams(responses: Sequence[str]) -> float | None:
    """Return the fraction of word bigrams in a set of answers that are distinct; None if no answer has two words.

    Source: Li, Galley, Brockett, Gao and Dolan 2016 (arXiv 1510.03055), distinct-2, over the answers to one prompt.
    """
    bigrams = [bigram for text in responses for bigram in pairwise(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def mean_overlap(responses: Sequence[str]) -> float | None:
    """Return the mean Jaccard similarity of word bigrams over all pairs of answers; None for a single answer.

    Two answers without bigrams count as 1 if they are equal, otherwise as 0.
    """
    shares = []
    for a, b in combinations(responses, 2):
        first, second = set(pairwise(a.split())), set(pairwise(b.split()))
        union = first | second
        shares.append(len(first & second) / len(union) if union else float(a == b))
    return float(np.mean(shares)) if shares else None


def longer_wins(answers: AnswerSet) -> float | None:
    """Return how often the answer with more characters has the higher score, as a fraction of pairs.

    Only pairs that differ in both length and score count; None if there are none.
    """
    wins = [
        (len(a) > len(b)) == (x > y)
        for (a, x), (b, y) in combinations(answers.scored(), 2)
        if len(a) != len(b) and x != y
    ]
    return sum(wins) / len(wins) if wins else None


def diversity_metrics(prefix: str, sets: Sequence[AnswerSet]) -> list[Metric]:
    """Return metrics of answer diversity: means over the prompts for which each measure is defined."""
    measures: dict[str, list[float] | list[float | None]] = {
        "characters": [float(np.mean([len(text) for text in answers.responses])) for answers in sets],
        "distinct_answers": [len(set(answers.responses)) / len(answers.responses) for answers in sets],
        "distinct_2": [distinct_ngrams(answers.responses) for answers in sets],
        "overlap": [mean_overlap(answers.responses) for answers in sets],
    }
    counts = [Metric(f"{prefix}/prompts", len(sets)), Metric(f"{prefix}/answers", sum(len(x.responses) for x in sets))]
    return counts + _intervals(prefix, measures)


def _intervals(prefix: str, measures: Mapping[str, Sequence[float | None]]) -> list[Metric]:
    metrics = []
    for name, values in measures.items():
        if defined := [value for value in values if value is not None]:
            interval = (share_interval if name in _SHARES else mean_interval)(defined)
            metrics.append(Metric.of(f"{prefix}/{name}", interval))
    return metrics


def score_metrics(prefix: str, sets: Sequence[AnswerSet]) -> list[Metric]:
    """Return metrics of the scores' distribution over answers and prompts, and of how often the longer answer wins."""
    scores_per_set = [[score for _, score in answers.scored()] for answers in sets]
    all_scores = [score for scores in scores_per_set for score in scores]
    metrics = [Metric(f"{prefix}/unscored", sum(len(answers.responses) for answers in sets) - len(all_scores))]
    if not all_scores:
        return metrics
    scored_sets = [scores for scores in scores_per_set if scores]
    measures: dict[str, list[float] | list[float | None]] = {
        "score": [float(np.mean(scores)) for scores in scored_sets],
        "best_score": [max(scores) for scores in scored_sets],
        "worst_score": [min(scores) for scores in scored_sets],
        "longer_wins": [longer_wins(answers) for answers in sets],
    }
    metrics += _intervals(prefix, measures)
    values = np.percentile(all_scores, list(SCORE_PERCENTILES.values()))
    metrics += [
        Metric(f"{prefix}/score/{name}", float(value), n=len(all_scores))
        for name, value in zip(SCORE_PERCENTILES, values, strict=True)
    ]
    all_equal = sum(len(set(scores)) == 1 for scores in scored_sets)
    return [*metrics, Metric(f"{prefix}/all_equal", all_equal, n=len(scored_sets))]
