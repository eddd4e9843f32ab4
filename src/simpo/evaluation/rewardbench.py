"""RewardBench 2: whether a reward model scores correct answers highest, and several correct ones alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.linalg import block_diag

from simpo.config import required, setting
from simpo.data.rows import rows_of
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.evaluation.answers import cell
from simpo.evaluation.runner import BenchmarkSettings
from simpo.judging.protocol import Answers, check_scores
from simpo.judging.scorers import ModelScorer
from simpo.models.checkpoint import model_digest, with_dtype
from simpo.models.devices import free_memory
from simpo.models.settings import ModelArguments
from simpo.runs.files import JsonLines
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import Metric, Stage, fingerprint
from simpo.statistics import bootstrap_interval

TIES = "Ties"
# The subsets, and what their metrics are called.
SUBSETS = {
    name: name.lower().replace(" ", "_") for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus", TIES)
}
_TIES_ID = re.compile(r"(ref|tied):(\d+)")
_PROMPTS_PER_PART = 256  # scored, and stored, together
_SEED = 0  # of the bootstrap

# The terms of each item of a subset, ``[n, m]``, whose sums the subset's score is computed from.
Terms = dict[str, np.ndarray]
Score = Callable[[np.ndarray], np.ndarray]  # of sums of terms, [..., m] -> [...]


@dataclass(kw_only=True)
class RewardBenchSettings(BenchmarkSettings):
    """RewardBench 2 on a reward model, and on the one that it is compared with.

    examples:
      simpo evaluate rewardbench outputs/reward --output_dir outputs/rewardbench
      simpo evaluate rewardbench outputs/reward --against outputs/reward-old --data test.parquet \\
          --output_dir outputs/rewardbench
    """

    model: str = required("Hub name or folder of the reward model.", positional="MODEL")
    against: str | None = setting(None, "Another reward model, for the differences.")
    data: str = setting("allenai/reward-bench-2", "File with the benchmark's rows, or its name on the hub.")
    split: str = setting("test", "Split of a hub data set.")

    def benchmark(self, log: Log) -> RewardBench:
        """The benchmark; raises :class:`SimpoError` if its rows cannot be read or there is no such model."""
        items = read_items(self.data, self.split)
        if missing := SUBSETS.keys() - {item.subset for item in items}:
            log(f"note: no rows of {', '.join(sorted(missing))}, so there is no score over all subsets")
        models = {"": self.model} | ({} if self.against is None else {"against/": self.against})
        return RewardBench(items, {prefix: self.model_arguments(name) for prefix, name in models.items()})


@dataclass(frozen=True)
class RewardBench:
    """Scores all answers and computes the scores of the subsets."""

    items: Sequence[Item]  # the rows
    # The model, by the empty string, and the one that it is compared with, by `against/`.
    models: Mapping[str, ModelArguments]

    def identity(self) -> dict[str, Any]:
        """The rows and the models."""
        rows = [[item.subset, item.key, item.answers.prompt, item.answers.responses] for item in self.items]
        found: dict[str, Any] = {"benchmark": "rewardbench", "rows": fingerprint(rows)}
        for prefix, model in self.models.items():
            found |= {f"{prefix}model": model_digest(model), f"{prefix}dtype": with_dtype(model).dtype}
        return found

    def measure(self, run: RunFolder) -> list[Metric]:
        """The scores of one model, or of both and their differences."""
        terms = {
            prefix: self._terms(model, JsonLines(run.path / f"{prefix}scores.jsonl", checked=True), run.log)
            for prefix, model in self.models.items()
        }
        return score_metrics(terms[""], terms.get("against/"))

    def _terms(self, model: ModelArguments, lines: JsonLines, log: Log) -> Terms:
        """Score the rows that are not in ``lines`` yet."""
        scorer = ModelScorer("reward", model, lambda line: None)  # its progress would start again with every part
        scores = {line["row"]: line["scores"] for line in lines}
        left = [row for row in range(len(self.items)) if row not in scores]
        for start in range(0, len(left), _PROMPTS_PER_PART):
            part = left[start : start + _PROMPTS_PER_PART]
            answers = [self.items[row].answers for row in part]
            found = scorer.score(answers)
            check_scores(found, answers, "reward")
            scores |= dict(zip(part, found, strict=True))
            lines.append({"row": row, "id": self.items[row].key, "scores": scores[row]} for row in part)
            log(f"{len(scores):,} of {len(self.items):,} prompts scored")
        del scorer
        free_memory()
        return item_terms(self.items, [scores[row] for row in range(len(self.items))])


# ---- Rows.


@dataclass(frozen=True)
class Item:
    """A prompt with its answers, the correct ones first; ``answers.id`` is its place, for messages."""

    subset: str
    key: str
    answers: Answers
    correct: int


def read_items(data: str, split: str) -> list[Item]:
    """Rows ``{id, prompt, chosen, rejected, subset}`` of a file or a hub data set, in their order."""
    dataset = load_rows(data, split=split, any_split=True)
    items: list[Item] = []
    places: dict[str, str] = {}  # of the rows of Ties by their ids
    for row, where in rows_of(dataset[:], range(len(dataset)), data):
        subset, key, prompt = (cell(row, name, where) for name in ("subset", "id", "prompt"))
        chosen, rejected = (cell(row, name, where, list) for name in ("chosen", "rejected"))
        if subset not in SUBSETS:
            raise SimpoError(f"{where}: subset: {subset!r:.60} is none of {', '.join(SUBSETS)}")
        if not all(isinstance(text, str) for text in chosen + rejected) or not rejected:
            raise SimpoError(f"{where}: chosen and rejected: expected lists of texts, at least one of them rejected")
        if subset == TIES:
            if not _TIES_ID.fullmatch(key):
                raise SimpoError(f"{where}: id: expected ref:NUMBER or tied:NUMBER in {TIES}, got {key!r:.60}")
            if key in places:
                raise SimpoError(f"{where}: id {key} occurs twice, first at {places[key]}")
            places[key] = where
        several = subset == TIES and key.startswith("tied:")
        if len(chosen) < 2 if several else len(chosen) != 1:
            expected = "at least two correct answers" if several else "one correct answer"
            raise SimpoError(f"{where}: chosen: expected {expected}, got {len(chosen)}")
        items.append(Item(subset, key, Answers(where, prompt, (*chosen, *rejected)), len(chosen)))
    if places and len({key.partition(":")[2] for key in places}) == len(places):
        raise SimpoError(f"{data}: {TIES}: no number has both a row ref:NUMBER and a row tied:NUMBER")
    return items


# ---- Scores of the subsets. Sources: Malik et al., arXiv 2506.01937, section 3; allenai/reward-bench,
# rewardbench/utils.py (reroll_and_score_dataset, process_single_model), which also defines how a draw counts.


def item_terms(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> Terms:
    """The terms that each subset's score is computed from; a prompt of Ties is one item with its reference.

    ``scores`` are those of each row's answers, in their order.
    """
    found: dict[str, list[list[float]]] = {}
    ties: dict[str, dict[str, tuple[float, float]]] = {}
    for item, given in zip(items, scores, strict=True):
        if item.subset == TIES:
            kind, _, number = item.key.partition(":")
            right, wrong = given[: item.correct], given[item.correct :]
            ties.setdefault(number, {})[kind] = (max(right) - min(right), min(right) - max(wrong))
        else:
            best = max(given)
            share = 1 / given.count(best) if given[0] == best else 0.0
            found.setdefault(item.subset, []).append([share, 1.0])
    if ties:
        found[TIES] = [_ties_terms(pair.get("ref"), pair.get("tied")) for pair in ties.values()]
    return {subset: np.array(found[subset]) for subset in SUBSETS if subset in found}


def _ties_terms(reference: tuple[float, float] | None, tied: tuple[float, float] | None) -> list[float]:
    """Numerators and denominators of Ties' three averages, from what separates answers to two prompts.

    Each of the two is ``(spread, gap)``: the best correct answer's score minus the worst correct one's, and the worst
    correct answer's minus the best wrong one's. All correct answers should have higher scores than all wrong ones, for
    both prompts, and by more than what separates correct ones. The last part is a small bonus for how much more.
    """
    terms = [0.0] * 6
    if tied is not None:
        terms[:2] = [float(tied[1] > 0), 1.0]
    if reference is not None:
        terms[2:4] = [float(reference[1] > 0), 1.0]
    if tied is not None and reference is not None:
        spread, gap = tied
        smaller = min(gap, reference[1])
        # For equal correct answers the limits; 0 where the gap is 0 as well.
        bonus = math.tanh(smaller / spread - 1) if spread else float(np.sign(smaller))
        terms[4:] = [0.2 * (gap > spread) + 0.2 * (smaller > spread) + 0.01 * bonus, 1.0]
    return terms


def subset_score(sums: np.ndarray) -> np.ndarray:
    """The score of a subset from sums ``[..., m]`` of its terms: accuracy, or Ties' weighted average."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = sums[..., ::2] / sums[..., 1::2]
    return shares[..., 0] if shares.shape[-1] == 1 else shares @ np.array([0.3, 0.3, 1.0])


def overall_score(widths: Sequence[int], sums: np.ndarray) -> np.ndarray:
    """The mean of the subsets' scores, from the sums of their terms next to one another, ``widths`` of each."""
    parts = np.split(sums, np.cumsum(widths)[:-1], axis=-1)
    return np.mean([subset_score(part) for part in parts], axis=0)


def score_metrics(after: Terms, before: Terms | None) -> list[Metric]:
    """The scores of one model, or of two and their differences, which are paired by prompt.

    The intervals of the subsets hold simultaneously; that of the mean over subsets is a plain 95% interval.
    """
    new, old = _rules(after), {} if before is None else _rules(before)
    stages: list[tuple[Stage | None, Any]] = [("before", old), ("after" if old else None, new)]
    metrics = []
    for stage, rules in stages:
        for name, (terms, score, family) in rules.items():
            found = bootstrap_interval(terms, score, seed=_SEED, family=family)
            metrics.append(Metric.of(f"rewardbench/{name}", found, stage))
    for name, (terms, score, family) in old.items():
        both = np.hstack([terms, new[name][0]])
        found = bootstrap_interval(both, partial(_difference, score), seed=_SEED, family=family)
        metrics.append(Metric.of(f"rewardbench/{name}/difference", found, method=f"paired, {found.method}"))
    return metrics


def _rules(terms: Terms) -> dict[str, tuple[np.ndarray, Score, int]]:
    """For each metric its terms ``[n, m]``, its score, and of how many its interval is one."""
    found: dict[str, tuple[np.ndarray, Score, int]] = {}
    if terms.keys() == SUBSETS.keys():
        widths = [part.shape[1] for part in terms.values()]
        found["score"] = block_diag(*terms.values()), partial(overall_score, widths), 1
    return found | {SUBSETS[subset]: (part, subset_score, len(terms)) for subset, part in terms.items()}


def _difference(score: Score, sums: np.ndarray) -> np.ndarray:
    before, after = np.split(sums, 2, axis=-1)
    return score(after) - score(before)
