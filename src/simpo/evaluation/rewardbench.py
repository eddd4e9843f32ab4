"""RewardBench 2: whether a reward model scores correct answers above wrong ones, and equally correct ones alike."""

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
# Subset -> name of its metric.
SUBSETS = {
    name: name.lower().replace(" ", "_") for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus", TIES)
}
_TIES_ID = re.compile(r"(ref|tied):(\d+)")
_PROMPTS_PER_PART = 256  # prompts scored and stored at a time
_SEED = 0  # for the bootstrap

# Subset -> terms of each item, [n, m]. A subset's score is a function of the terms' sums, [..., m] -> [...].
Terms = dict[str, np.ndarray]
Score = Callable[[np.ndarray], np.ndarray]


@dataclass(kw_only=True)
class RewardBenchSettings(BenchmarkSettings):
    """RewardBench 2 for a reward model and, optionally, a second one to compare it with.

    examples:
      simpo evaluate rewardbench outputs/reward --output_dir outputs/rewardbench
      simpo evaluate rewardbench outputs/reward --against outputs/reward-old --data test.parquet \\
          --output_dir outputs/rewardbench
    """

    model: str = required("Hub name or folder of the reward model.", positional="MODEL")
    against: str | None = setting(None, "Baseline reward model to compute differences to.")
    data: str = setting("allenai/reward-bench-2", "File with the benchmark's rows, or a hub dataset.")
    split: str = setting("test", "Split of a hub dataset.")

    def benchmark(self, log: Log) -> RewardBench:
        """Prepare the benchmark; raises :class:`SimpoError` if the rows cannot be read."""
        items = read_items(self.data, self.split)
        if missing := SUBSETS.keys() - {item.subset for item in items}:
            log(f"note: no rows for {', '.join(sorted(missing))}, so there is no overall score")
        models = {"": self.model} | ({} if self.against is None else {"against/": self.against})
        return RewardBench(items, {prefix: self.model_arguments(name) for prefix, name in models.items()})


@dataclass(frozen=True)
class RewardBench:
    """Scores all answers with a reward model, and computes the score of every subset."""

    items: Sequence[Item]  # the rows
    models: Mapping[str, ModelArguments]  # the model under "", and the baseline, if any, under "against/"

    def identity(self) -> dict[str, Any]:
        """Return the rows and the models."""
        rows = [[item.subset, item.key, item.answers.prompt, item.answers.responses] for item in self.items]
        identity: dict[str, Any] = {"benchmark": "rewardbench", "rows": fingerprint(rows)}
        for prefix, model in self.models.items():
            identity |= {f"{prefix}model": model_digest(model), f"{prefix}dtype": with_dtype(model).dtype}
        return identity

    def measure(self, run: RunFolder) -> list[Metric]:
        """Score the model and, if there is a baseline, the baseline and the differences."""
        terms = {
            prefix: self._terms(model, JsonLines(run.path / f"{prefix}scores.jsonl", checked=True), run.log)
            for prefix, model in self.models.items()
        }
        return score_metrics(terms[""], terms.get("against/"))

    def _terms(self, model: ModelArguments, lines: JsonLines, log: Log) -> Terms:
        """Score the rows that are not in ``lines`` yet, and return the terms of all rows."""
        scorer = ModelScorer("reward", model, lambda line: None)  # its progress would restart with every part
        scores = {line["row"]: line["scores"] for line in lines}
        remaining = [row for row in range(len(self.items)) if row not in scores]
        for start in range(0, len(remaining), _PROMPTS_PER_PART):
            part = remaining[start : start + _PROMPTS_PER_PART]
            answers = [self.items[row].answers for row in part]
            new = scorer.score(answers)
            check_scores(new, answers, "reward")
            scores |= dict(zip(part, new, strict=True))
            lines.append({"row": row, "id": self.items[row].key, "scores": scores[row]} for row in part)
            log(f"{len(scores):,} of {len(self.items):,} prompts scored")
        del scorer
        free_memory()
        return item_terms(self.items, [scores[row] for row in range(len(self.items))])


# ---- Rows.


@dataclass(frozen=True)
class Item:
    """A prompt with its answers, the correct ones first; ``answers.id`` is the row's location, for messages."""

    subset: str
    key: str
    answers: Answers
    correct: int  # number of correct answers


def read_items(data: str, split: str) -> list[Item]:
    """Read rows ``{id, prompt, chosen, rejected, subset}`` from a file or a hub dataset."""
    dataset = load_rows(data, split=split, any_split=True)
    items: list[Item] = []
    locations: dict[str, str] = {}  # of rows in Ties, by id
    for row, where in rows_of(dataset[:], range(len(dataset)), data):
        subset, key, prompt = (cell(row, name, where) for name in ("subset", "id", "prompt"))
        chosen, rejected = (cell(row, name, where, list) for name in ("chosen", "rejected"))
        if subset not in SUBSETS:
            raise SimpoError(f"{where}: subset: expected one of {', '.join(SUBSETS)}, got {subset!r:.60}")
        if not all(isinstance(text, str) for text in chosen + rejected) or not rejected:
            raise SimpoError(f"{where}: chosen and rejected: expected lists of texts, with at least one rejected text")
        if subset == TIES:
            if not _TIES_ID.fullmatch(key):
                raise SimpoError(f"{where}: id: expected ref:NUMBER or tied:NUMBER in {TIES}, got {key!r:.60}")
            if key in locations:
                raise SimpoError(f"{where}: id {key} occurs twice, first at {locations[key]}")
            locations[key] = where
        multiple = subset == TIES and key.startswith("tied:")
        if len(chosen) < 2 if multiple else len(chosen) != 1:
            expected = "at least two correct answers" if multiple else "one correct answer"
            raise SimpoError(f"{where}: chosen: expected {expected}, got {len(chosen)}")
        items.append(Item(subset, key, Answers(where, prompt, (*chosen, *rejected)), len(chosen)))
    if locations and len({key.partition(":")[2] for key in locations}) == len(locations):
        raise SimpoError(f"{data}: {TIES}: expected both ref:NUMBER and tied:NUMBER for at least one NUMBER")
    return items


# ---- Subset scores. Sources: Malik et al., arXiv 2506.01937, section 3; allenai/reward-bench, rewardbench/utils.py
# (reroll_and_score_dataset, process_single_model), which also defines how ties in score count.


def item_terms(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> Terms:
    """Compute the terms of each subset's score; in Ties, a prompt and its reference prompt form one item.

    ``scores`` holds the scores of each row's answers, in order.
    """
    terms: dict[str, list[list[float]]] = {}
    ties: dict[str, dict[str, tuple[float, float]]] = {}
    for item, given in zip(items, scores, strict=True):
        if item.subset == TIES:
            kind, _, number = item.key.partition(":")
            right, wrong = given[: item.correct], given[item.correct :]
            ties.setdefault(number, {})[kind] = (max(right) - min(right), min(right) - max(wrong))
        else:
            best = max(given)
            share = 1 / given.count(best) if given[0] == best else 0.0
            terms.setdefault(item.subset, []).append([share, 1.0])
    if ties:
        terms[TIES] = [_ties_terms(pair.get("ref"), pair.get("tied")) for pair in ties.values()]
    return {subset: np.array(terms[subset]) for subset in SUBSETS if subset in terms}


def _ties_terms(reference: tuple[float, float] | None, tied: tuple[float, float] | None) -> list[float]:
    """Return numerators and denominators of the three averages in the Ties score, for two related prompts.

    Each argument is ``(spread, gap)``: the best minus the worst score of a correct answer, and the worst score of a
    correct answer minus the best score of a wrong one. For both prompts, every correct answer should score above every
    wrong one, and by more than the correct ones differ. The last term is a small bonus for how much more.
    """
    terms = [0.0] * 6
    if tied is not None:
        terms[:2] = [float(tied[1] > 0), 1.0]
    if reference is not None:
        terms[2:4] = [float(reference[1] > 0), 1.0]
    if tied is not None and reference is not None:
        spread, gap = tied
        smaller = min(gap, reference[1])
        # If the spread is 0, use the limit, or 0 if the gap is 0 as well.
        bonus = math.tanh(smaller / spread - 1) if spread else float(np.sign(smaller))
        terms[4:] = [0.2 * (gap > spread) + 0.2 * (smaller > spread) + 0.01 * bonus, 1.0]
    return terms


def subset_score(sums: np.ndarray) -> np.ndarray:
    """Compute a subset's score from its summed terms ``[..., m]``: accuracy, or the weighted average for Ties."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = sums[..., ::2] / sums[..., 1::2]
    return shares[..., 0] if shares.shape[-1] == 1 else shares @ np.array([0.3, 0.3, 1.0])


def overall_score(widths: Sequence[int], sums: np.ndarray) -> np.ndarray:
    """Compute the mean of the subset scores from their concatenated sums of terms, with ``widths`` terms each."""
    parts = np.split(sums, np.cumsum(widths)[:-1], axis=-1)
    return np.mean([subset_score(part) for part in parts], axis=0)


def score_metrics(after: Terms, before: Terms | None) -> list[Metric]:
    """Return the scores of one model, or of two models with their differences, paired by prompt.

    The intervals of the subsets hold simultaneously; the interval of the overall score is an ordinary 95% interval.
    """
    new, old = _estimators(after), {} if before is None else _estimators(before)
    stages: list[tuple[Stage | None, Any]] = [("before", old), ("after" if old else None, new)]
    metrics = []
    for stage, estimators in stages:
        for name, (terms, score, family) in estimators.items():
            interval = bootstrap_interval(terms, score, seed=_SEED, family=family)
            metrics.append(Metric.of(f"rewardbench/{name}", interval, stage))
    for name, (terms, score, family) in old.items():
        both = np.hstack([terms, new[name][0]])
        interval = bootstrap_interval(both, partial(_difference, score), seed=_SEED, family=family)
        metrics.append(Metric.of(f"rewardbench/{name}/difference", interval, method=f"paired, {interval.method}"))
    return metrics


def _estimators(terms: Terms) -> dict[str, tuple[np.ndarray, Score, int]]:
    """Map each metric to its terms ``[n, m]``, its score, and the number of simultaneous intervals it belongs to."""
    estimators: dict[str, tuple[np.ndarray, Score, int]] = {}
    if terms.keys() == SUBSETS.keys():
        widths = [part.shape[1] for part in terms.values()]
        estimators["score"] = block_diag(*terms.values()), partial(overall_score, widths), 1
    return estimators | {SUBSETS[subset]: (part, subset_score, len(terms)) for subset, part in terms.items()}


def _difference(score: Score, sums: np.ndarray) -> np.ndarray:
    before, after = np.split(sums, 2, axis=-1)
    return score(after) - score(before)
