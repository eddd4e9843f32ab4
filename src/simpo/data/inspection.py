"""What a prepared data set would teach a model, and how a prompt's several answers differ."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from operator import itemgetter

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.data.formats import is_number
from simpo.data.rows import DataReport, Row
from simpo.data.settings import TokenizeSettings
from simpo.data.shapes import canonical_rows, first_canonical
from simpo.data.tokenizing import Prepared, end_token_id
from simpo.runs.results import Metric
from simpo.statistics import mean_interval, share_interval

PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}


@dataclass(frozen=True)
class Inspection:
    """Figures of one data set, over the rows that are used. Of a ranking, ``chosen`` is the best response and
    ``rejected`` the last; single responses (conversations, feedback) have one part ``response``.

    Attributes:
        report: what happened to every row.
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
        prepared: as :func:`simpo.data.tokenizing.prepare` gave it.
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
    """Digests of each row (prompt with responses) and of its prompt; through Arrow, because data sets may be large."""
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


# ---- Several answers to one prompt: how different they are, how their scores spread, and what length has to
# do with it.


SCORE_PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}


_WORDS = 2  # of an n-gram


_SHARES = ("distinct_answers", "distinct_2", "overlap", "longer_wins")


@dataclass(frozen=True)
class AnswerSet:
    """The answers to one prompt.

    Attributes:
        responses: their texts.
        scores: one number each, the higher the better; None for an answer without one, and for all if there are none.
    """

    responses: Sequence[str]
    scores: Sequence[float | None] | None = None

    def scored(self) -> list[tuple[str, float]]:
        """The answers that have a score, with it."""
        pairs = zip(self.responses, self.scores or (), strict=False)
        return [(text, score) for text, score in pairs if score is not None]


def read_answer_sets(dataset: Dataset) -> list[AnswerSet]:
    """The answers of every row that has ``responses``, K-wise data or sampled; other rows are left out.

    Args:
        dataset: rows as :func:`simpo.data.sources.load_rows` gives them.
    """
    rows = canonical_rows(dataset)
    return [_answers(row) for row in rows if isinstance(row.get("responses"), list) and row["responses"]]


def is_sampled(dataset: Dataset) -> bool:
    """Whether the rows are answers as ``simpo sample`` and ``simpo annotate`` leave them, not comparisons yet."""
    row = first_canonical(dataset)
    return "responses" in row and ("scores" not in row or "finished" in row)


def distinct_ngrams(responses: Sequence[str]) -> float | None:
    """Share of different ones among all word bigrams of some answers; None where no answer has two words.

    Source: Li, Galley, Brockett, Gao and Dolan 2016 (arXiv 1510.03055), distinct-2, over the answers to one prompt.
    """
    found = [gram for text in responses for gram in _ngrams(text)]
    return len(set(found)) / len(found) if found else None


def mean_overlap(responses: Sequence[str]) -> float | None:
    """Mean over all pairs of answers of the share of word bigrams that both have (Jaccard); None for one answer.

    Two answers without bigrams overlap wholly if they are the same, else not at all.
    """
    shares = [_overlap(a, b) for a, b in combinations(responses, 2)]
    return float(np.mean(shares)) if shares else None


def longer_wins(answers: AnswerSet) -> float | None:
    """Share of the pairs that differ in score and in characters whose longer answer has the higher score.

    None where no pair differs in both.
    """
    found = [
        (len(a) > len(b)) == (x > y)
        for (a, x), (b, y) in combinations(answers.scored(), 2)
        if len(a) != len(b) and x != y
    ]
    return sum(found) / len(found) if found else None


def diversity_metrics(prefix: str, sets: Sequence[AnswerSet]) -> list[Metric]:
    """How different the answers to a prompt are, means over prompts; a prompt of which a figure is None is left out."""
    lengths = [float(np.mean([len(text) for text in found.responses])) for found in sets]
    figures = {
        "characters": lengths,
        "distinct_answers": [len(set(found.responses)) / len(found.responses) for found in sets],
        "distinct_2": _known(distinct_ngrams(found.responses) for found in sets),
        "overlap": _known(mean_overlap(found.responses) for found in sets),
    }
    counts = [Metric(f"{prefix}/prompts", len(sets)), Metric(f"{prefix}/answers", sum(len(x.responses) for x in sets))]
    return counts + _intervals(prefix, figures)


def _intervals(prefix: str, figures: Mapping[str, Sequence[float]]) -> list[Metric]:
    """Means over prompts, of figures that some prompt has."""
    metrics = []
    for name, values in figures.items():
        if values:
            found = (share_interval if name in _SHARES else mean_interval)(values)
            metrics.append(Metric.of(f"{prefix}/{name}", found))
    return metrics


def score_metrics(prefix: str, sets: Sequence[AnswerSet]) -> list[Metric]:
    """How scores are distributed, over answers and over prompts, and how often the longer answer has the higher one."""
    scored = [[score for _, score in found.scored()] for found in sets]
    every = [score for scores in scored for score in scores]
    metrics = [Metric(f"{prefix}/unscored", sum(len(found.responses) for found in sets) - len(every))]
    if not every:
        return metrics
    some = [scores for scores in scored if scores]
    figures = {
        "score": [float(np.mean(scores)) for scores in some],
        "best_score": [max(scores) for scores in some],
        "worst_score": [min(scores) for scores in some],
        "longer_wins": _known(map(longer_wins, sets)),
    }
    metrics += _intervals(prefix, figures)
    values = np.percentile(every, list(SCORE_PERCENTILES.values()))
    metrics += [
        Metric(f"{prefix}/score/{name}", float(value), n=len(every))
        for name, value in zip(SCORE_PERCENTILES, values, strict=True)
    ]
    return [*metrics, Metric(f"{prefix}/all_equal", sum(len(set(scores)) == 1 for scores in some), n=len(some))]


def _answers(row: Row) -> AnswerSet:
    scores = row.get("scores")
    known = (
        isinstance(scores, list)
        and len(scores) == len(row["responses"])
        and all(score is None or is_number(score) for score in scores)
    )
    return AnswerSet([_text(response) for response in row["responses"]], scores if known else None)


def _text(response: object) -> str:
    """The text of a response: a string, a message, or the last of several messages."""
    if isinstance(response, list) and response:
        response = response[-1]
    return str(response.get("content")) if isinstance(response, dict) else str(response)


def _ngrams(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + _WORDS]) for start in range(len(words) - _WORDS + 1)]


def _overlap(a: str, b: str) -> float:
    first, second = set(_ngrams(a)), set(_ngrams(b))
    union = first | second
    return len(first & second) / len(union) if union else float(a == b)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
