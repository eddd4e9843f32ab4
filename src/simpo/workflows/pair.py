"""``simpo pair``: preference rows from scored responses, and counts of the answers that were not used."""

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

# Why an answer, a prompt or a pair was dropped: the end of the metric's name.
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
    CLOSE: "pairs: scores closer than min_gap",
    UNEVEN: "pairs: lengths beyond max_length_ratio",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class PairSettings:
    """Settings for making pairs; the defaults are the paper's.

    ``keep_unfinished`` is off because an answer in a pair ends with the end-of-turn token, which a model did not write
    where ``max_new_tokens`` cut it: a chosen one would teach the model to stop in the middle of a sentence.
    """

    pairs: PairKind = setting("best_worst", "Which answers to a prompt are compared; ranking: all of them at once.")
    min_gap: float = setting(0.0, "Least difference in score of a pair, or of a ranking's best and worst.", least=0)
    max_length_ratio: float | None = setting(
        None, "Most characters of the longer answer over the shorter's (default: no limit).", least=1
    )
    keep_unfinished: bool = setting(False, "Also pair answers that max_new_tokens cut off.")
    seed: int = setting(42, "Seed of best_random.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.max_length_ratio is not None and self.pairs == "ranking":
            raise SimpoError("max_length_ratio: a ranking has no pairs; leave it out or choose other pairs")


@dataclass
class PairReport:
    """Counts of the prompts that were read, the rows that were made, and what was dropped, by reason."""

    prompts: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The report as text."""
        dropped = [f"  dropped {count:,} {_DESCRIPTIONS[reason]}" for reason, count in self.dropped.items()]
        return [f"pairs: {self.rows:,} of {self.prompts:,} prompts", *dropped]


class _Answer(NamedTuple):
    place: int  # among the prompt's responses
    text: str
    score: float


def make_pairs(records: Iterable[Mapping[str, Any]], settings: PairSettings) -> tuple[list[Row], PairReport]:
    """Rows ``{prompt, chosen, rejected, chosen_score, rejected_score, id}``, or ``{prompt, responses, scores, id}``.

    Best against worst is how the paper pairs its own samples (section 4, after Llama-3-Instruct). Among identical
    answers, and among answers with equal scores, the first one counts.

    Of the records ``{id, prompt, responses, scores}``, an answer whose score is None is left out. ``finished``, if
    present, tells for every response whether it ended on its own.
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
    """The distinct answers that have a score and may be paired, in their order."""
    found: dict[str, _Answer] = {}
    finished = record.get("finished", [True] * len(record["responses"]))
    for place, (text, score, ended) in enumerate(zip(record["responses"], record["scores"], finished, strict=True)):
        stripped = text.strip()  # some templates strip messages, which makes surrounding white space irrelevant
        if score is None:
            report.dropped[UNSCORED] += 1
        elif not (ended or settings.keep_unfinished):
            report.dropped[UNFINISHED] += 1
        elif not stripped:
            report.dropped[EMPTY] += 1
        elif stripped in found:
            report.dropped[IDENTICAL] += 1
        else:
            found[stripped] = _Answer(place, text, score)
    return list(found.values())


def _candidates(answers: Sequence[_Answer], prompt_id: str, settings: PairSettings) -> list[list[_Answer]]:
    """The groups of answers that may make a row, each with its best answer first."""
    ranked = sorted(answers, key=lambda answer: -answer.score)  # stable: among equals the first stays first
    best, worst = ranked[0], min(answers, key=lambda answer: answer.score)
    if settings.pairs == "all":
        return [list(pair) for pair in combinations(ranked, 2)]
    if settings.pairs == "ranking":
        return [ranked]
    if settings.pairs == "best_random":
        worse = [answer for answer in answers if answer.score < best.score]
        # Seeded by the prompt too, so that a prompt's draw does not depend on the prompts before it.
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
    suffix = (
        f"/{chosen.place}-{rejected.place}" if settings.pairs == "all" else ""
    )  # keeps the ids of a prompt's pairs apart
    row |= {"chosen": chosen.text, "rejected": rejected.text}
    return row | {"chosen_score": chosen.score, "rejected_score": rejected.score, "id": record["id"] + suffix}


# ---- The workflows: annotated responses, or a scoring function, to a file of pairs.


def pair_annotated(annotated: Path, settings: PairSettings, folder: Path, *, argv: Sequence[str] = ()) -> Path:
    """Write ``pairs.jsonl`` and ``results.json``; a finished run is left as it is.

    ``annotated`` is ``annotated.jsonl`` of ``simpo annotate`` or its folder. Returns the path of ``results.json``.
    """
    path = annotated / ANNOTATED if annotated.is_dir() else annotated
    with RunFolder(folder, command="pair") as run:
        records = _read_annotated(path)
        rows, report = make_pairs(records, settings)
        for line in report.lines():
            run.log(line)
        _check_any(rows, report, path)
        run.begin({"annotated": fingerprint(records), **dataclasses.asdict(settings)}, argv=argv)

        def write() -> list[Metric]:
            write_lines(folder / FILE_NAME, rows)
            return _metrics(rows, report)

        return run.complete(write)


def pair_responses(
    responses: Path, scorer: Callable[[Any, str], float], output: Path, settings: PairSettings | None = None
) -> PairReport:
    """Score a file of sampled responses with a function, and pair them.

    ``responses`` is ``responses.jsonl`` of ``simpo sample``; ``scorer`` maps a prompt and a response to a number, the
    higher the better.
    """
    records = read_responses(responses)
    for record in records:
        record["scores"] = [scorer(record["prompt"], response) for response in record["responses"]]
        if not all(map(math.isfinite, record["scores"])):
            raise SimpoError(
                f"{responses}: prompt {record['id']}: the scorer returned {record['scores']}; it must return numbers"
            )
    rows, report = make_pairs(records, settings or PairSettings())
    _check_any(rows, report, responses)
    write_lines(output, rows)
    return report


def _read_annotated(path: Path) -> list[Row]:
    records = read_responses(path)
    for number, record in enumerate(records, start=1):
        scores = record.get("scores")
        if not isinstance(scores, list) or len(scores) != len(record["responses"]):
            raise SimpoError(f"{path}:{number}: scores: expected one for every response, as simpo annotate writes them")
        if not all(score is None or is_number(score) for score in scores):
            raise SimpoError(f"{path}:{number}: scores: expected numbers or null, got {scores!s:.60}")
        finished = record.get("finished", [True] * len(scores))
        if not isinstance(finished, list) or [type(ended) for ended in finished] != [bool] * len(scores):
            raise SimpoError(f"{path}:{number}: finished: expected true or false for every response")
    return records


def _check_any(rows: Sequence[Row], report: PairReport, path: Path) -> None:
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
