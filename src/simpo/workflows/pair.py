"""``simpo pair``: build preference rows from scored responses, and count the answers that were not used."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np

from simpo.config import check_values, setting
from simpo.data.formats import is_number
from simpo.errors import SimpoError
from simpo.judging.annotate import FILE_NAME as ANNOTATED
from simpo.judging.annotate import read_responses
from simpo.runs.files import write_lines
from simpo.runs.folder import RunFolder
from simpo.runs.results import Metric, fingerprint
from simpo.statistics import mean_interval, proportion_interval

PairKind = Literal["best_worst", "all", "best_random", "ranking"]
FILE_NAME = "pairs.jsonl"

# Reasons for dropping an answer, a prompt or a pair; the last part of the metric's name.
IDENTICAL, UNSCORED, EMPTY = "answers_the_same_as_another_one", "answers_without_a_score", "answers_empty"
UNFINISHED = "answers_cut_at_max_new_tokens"
TOO_FEW = "prompts_fewer_than_two_different_answers_with_a_score"
EQUAL, CLOSE = "pairs_equally_good", "pairs_scores_closer_than_min_gap"
UNEVEN = "pairs_beyond_max_length_ratio"
_DESCRIPTIONS = {
    IDENTICAL: "answers: identical to another one",
    UNSCORED: "answers: without a score",
    EMPTY: "answers: empty",
    UNFINISHED: "answers: cut at max_new_tokens",
    TOO_FEW: "prompts: fewer than two different answers with a score",
    EQUAL: "pairs: equal scores",
    CLOSE: "pairs: score difference below min_gap",
    UNEVEN: "pairs: length ratio above max_length_ratio",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class PairSettings:
    """Settings for building pairs; the defaults are the paper's.

    ``keep_unfinished`` is off by default: training appends an end-of-turn token to each answer, so a chosen answer that
    was cut at ``max_new_tokens`` would teach the model to stop in mid-sentence.
    """

    pairs: PairKind = setting("best_worst", "Which answers to a prompt to pair; ranking puts all of them in one row.")
    min_gap: float = setting(0.0, "Minimum score gap in a pair, or between a ranking's best and worst.", least=0)
    max_length_ratio: float | None = setting(
        None, "Maximum ratio of the longer to the shorter answer, in characters (default: no limit).", least=1
    )
    keep_unfinished: bool = setting(False, "Also pair answers that were cut at max_new_tokens.")
    seed: int = setting(42, "Random seed for best_random.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.max_length_ratio is not None and self.pairs == "ranking":
            raise SimpoError("max_length_ratio: a ranking has no pairs; leave it out or choose other pairs")


@dataclass
class PairReport:
    """Counts of prompts read, rows built, and answers, prompts and pairs dropped by reason."""

    prompts: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        dropped = [f"  dropped {count:,} {_DESCRIPTIONS[reason]}" for reason, count in self.dropped.items()]
        return [f"pairs: {self.rows:,} of {self.prompts:,} prompts", *dropped]


class _Answer(NamedTuple):
    position: int  # among the prompt's responses
    text: str
    score: float


def make_pairs(records: Iterable[Mapping[str, Any]], settings: PairSettings) -> tuple[list[Row], PairReport]:
    """Build preference rows from scored responses.

    Rows are ``{prompt, chosen, rejected, chosen_score, rejected_score, id}``, or for rankings ``{prompt, responses,
    scores, id}``. ``best_worst`` is how the paper pairs its own samples (section 4). Among answers that are
    identical or have equal scores, the first one is used.

    Records are ``{id, prompt, responses, scores}``; answers with score None are dropped. An optional ``finished`` says
    for each response whether it ended on its own.
    """
    report = PairReport()
    rows = []
    for record in records:
        report.prompts += 1
        answers = _usable_answers(record, settings, report)
        if len(answers) < 2:
            report.dropped[TOO_FEW] += 1
            continue
        for candidate in _candidates(answers, record["id"], settings):
            reason = _reason_to_drop(candidate, settings)
            if reason is None:
                rows.append(_row(record, candidate, settings))
            else:
                report.dropped[reason] += 1
    report.rows = len(rows)
    return rows, report


def _usable_answers(record: Mapping[str, Any], settings: PairSettings, report: PairReport) -> list[_Answer]:
    """Return the distinct, scored answers that may be paired, in their original order."""
    usable: dict[str, _Answer] = {}
    finished = record.get("finished", [True] * len(record["responses"]))
    for position, (text, score, ended) in enumerate(zip(record["responses"], record["scores"], finished, strict=True)):
        stripped = text.strip()  # some templates strip messages, so surrounding whitespace must not matter
        if score is None:
            report.dropped[UNSCORED] += 1
        elif not (ended or settings.keep_unfinished):
            report.dropped[UNFINISHED] += 1
        elif not stripped:
            report.dropped[EMPTY] += 1
        elif stripped in usable:
            report.dropped[IDENTICAL] += 1
        else:
            usable[stripped] = _Answer(position, text, score)
    return list(usable.values())


def _candidates(answers: Sequence[_Answer], prompt_id: str, settings: PairSettings) -> list[list[_Answer]]:
    """Return the groups of answers that may become rows, each with its best answer first."""
    ranked = sorted(answers, key=lambda answer: -answer.score)  # stable: ties keep their order
    best, worst = ranked[0], min(answers, key=lambda answer: answer.score)
    if settings.pairs == "all":
        return [list(pair) for pair in combinations(ranked, 2)]
    if settings.pairs == "ranking":
        return [ranked]
    if settings.pairs == "best_random":
        worse = [answer for answer in answers if answer.score < best.score]
        # The prompt is part of the seed, so that a prompt's draw does not depend on the prompts before it.
        worst = Random(f"{settings.seed} {prompt_id}").choice(worse or [worst])  # noqa: S311 - sampling, not secrets
    return [[best, worst]]


def _reason_to_drop(answers: Sequence[_Answer], settings: PairSettings) -> str | None:
    gap = answers[0].score - answers[-1].score
    if gap == 0:
        return EQUAL
    if gap < settings.min_gap:
        return CLOSE
    if settings.max_length_ratio is not None:
        shorter, longer = sorted(len(answer.text) for answer in answers)
        if longer > settings.max_length_ratio * shorter:
            return UNEVEN
    return None


def _row(record: Mapping[str, Any], answers: Sequence[_Answer], settings: PairSettings) -> Row:
    row = {key: record[key] for key in ("prompt", "tools", "chat_template_kwargs") if key in record}
    if settings.pairs == "ranking":
        texts, scores = [answer.text for answer in answers], [answer.score for answer in answers]
        return row | {"responses": texts, "scores": scores, "id": record["id"]}
    chosen, rejected = answers
    suffix = f"/{chosen.position}-{rejected.position}" if settings.pairs == "all" else ""  # makes ids unique
    row |= {"chosen": chosen.text, "rejected": rejected.text}
    return row | {"chosen_score": chosen.score, "rejected_score": rejected.score, "id": record["id"] + suffix}


# ---- Workflows: from annotated responses, or a scoring function, to a file of pairs.


def pair_annotated(annotated: Path, settings: PairSettings, folder: Path, *, argv: Sequence[str] = ()) -> Path:
    """Pair ``annotated.jsonl`` from ``simpo annotate`` (or its folder); a finished run is left unchanged.

    Writes ``pairs.jsonl`` and ``results.json``, and returns the path of the latter.
    """
    path = annotated / ANNOTATED if annotated.is_dir() else annotated
    with RunFolder(folder, command="pair") as run:
        records = _read_annotated(path)
        rows, report = make_pairs(records, settings)
        for line in report.lines():
            run.log(line)
        _check_not_empty(rows, report, path)
        run.begin({"annotated": fingerprint(records), **dataclasses.asdict(settings)}, argv=argv)

        def write() -> list[Metric]:
            write_lines(folder / FILE_NAME, rows)
            return _metrics(rows, report)

        return run.complete(write)


def pair_responses(
    responses: Path, scorer: Callable[[Any, str], float], output: Path, settings: PairSettings | None = None
) -> PairReport:
    """Score sampled responses with a function and pair them.

    ``responses`` is ``responses.jsonl`` from ``simpo sample``. ``scorer`` maps a prompt and a response to a number;
    higher is better.
    """
    records = read_responses(responses)
    for record in records:
        record["scores"] = [scorer(record["prompt"], response) for response in record["responses"]]
        if not all(map(math.isfinite, record["scores"])):
            raise SimpoError(
                f"{responses}: prompt {record['id']}: the scorer returned {record['scores']}; each must be finite"
            )
    rows, report = make_pairs(records, settings or PairSettings())
    _check_not_empty(rows, report, responses)
    write_lines(output, rows)
    return report


def _read_annotated(path: Path) -> list[Row]:
    records = read_responses(path)
    for number, record in enumerate(records, start=1):
        scores = record.get("scores")
        if not isinstance(scores, list) or len(scores) != len(record["responses"]):
            raise SimpoError(f"{path}:{number}: scores: expected one per response, as written by simpo annotate")
        if not all(score is None or is_number(score) for score in scores):
            raise SimpoError(f"{path}:{number}: scores: expected numbers or null, got {scores!s:.60}")
        finished = record.get("finished", [True] * len(scores))
        if not isinstance(finished, list) or [type(ended) for ended in finished] != [bool] * len(scores):
            raise SimpoError(f"{path}:{number}: finished: expected true or false for each response")
    return records


def _check_not_empty(rows: Sequence[Row], report: PairReport, path: Path) -> None:
    if not rows:
        reasons = ", ".join(f"{count:,} {_DESCRIPTIONS[reason]}" for reason, count in report.dropped.items())
        remedy = "; raise max_new_tokens, or set keep_unfinished" if report.dropped[UNFINISHED] else ""
        raise SimpoError(f"{path}: no pairs (dropped {reasons}){remedy}")


def _metrics(rows: Sequence[Row], report: PairReport) -> list[Metric]:
    metrics = [Metric("pair/prompts", report.prompts), Metric("pair/rows", report.rows)]
    metrics += [Metric(f"pair/dropped/{reason}", count) for reason, count in report.dropped.items()]
    scores = [row.get("scores") or [row["chosen_score"], row["rejected_score"]] for row in rows]
    metrics.append(Metric.of("pair/score_gap", mean_interval([float(one[0] - one[-1]) for one in scores])))
    if "chosen" in rows[0]:
        lengths = np.array([[len(row["chosen"]), len(row["rejected"])] for row in rows])
        longer = proportion_interval(int((lengths[:, 0] > lengths[:, 1]).sum()), len(rows))
        metrics.append(Metric.of("pair/chosen_longer", longer))
        for name, values in zip(("chosen", "rejected"), lengths.T, strict=True):
            metrics.append(Metric(f"pair/{name}_characters", float(values.mean()), n=len(rows)))
    return metrics
