"""``simpo pair``: preference rows from scored responses, and why other answers were not used."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np

from simpo.data.formats import is_number
from simpo.errors import SimpoError
from simpo.judging.annotate import FILE_NAME as ANNOTATED
from simpo.judging.annotate import read_responses
from simpo.runs.folder import RunFolder
from simpo.runs.lines import write_lines
from simpo.runs.results import Metric, fingerprint
from simpo.statistics import mean_interval, proportion_interval

PairKind = Literal["best_worst", "all", "best_random", "ranking"]


KINDS: tuple[PairKind, ...] = ("best_worst", "all", "best_random", "ranking")


IDENTICAL, UNSCORED, EMPTY = "answers: the same as another one", "answers: without a score", "answers: empty"


UNFINISHED = "answers: cut at max_new_tokens"


ALIKE = "prompts: fewer than two different answers with a score"


EQUAL, CLOSE, UNEVEN = "pairs: equally good", "pairs: scores closer than min_gap", "pairs: beyond max_length_ratio"


Row = dict[str, Any]


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made; the defaults are the paper's.

    Attributes:
        pairs: of a prompt's answers: ``best_worst``; ``all`` two that differ in score; ``best_random``, one that is
            worse; or ``ranking``, no pair but all of them with their scores.
        min_gap: scores of a pair, or of a ranking's best and worst, differ at least by this.
        max_length_ratio: the longer answer of a pair has at most so many times the characters of the shorter; None for
            any.
        keep_unfinished: pair also answers that were cut at ``max_new_tokens``. In a pair they end with the end-of-turn
            token, which the model has not written there: chosen ones teach to stop in the middle of a sentence.
        seed: of ``best_random``.

    Raises:
        SimpoError: a value out of its bounds; names the key.
    """

    pairs: PairKind = field(
        default="best_worst", metadata={"help": "Which answers to a prompt are compared; ranking: all of them at once."}
    )
    min_gap: float = field(default=0.0, metadata={"help": "Least difference of the scores of a pair."})
    max_length_ratio: float | None = field(
        default=None, metadata={"help": "Most characters of a pair's longer answer over the shorter's (default: any)."}
    )
    keep_unfinished: bool = field(default=False, metadata={"help": "Pair also answers that max_new_tokens cut off."})
    seed: int = field(default=42, metadata={"help": "Of best_random."})

    def __post_init__(self) -> None:
        if self.pairs not in KINDS:
            raise SimpoError(f"pairs: {self.pairs!r} is not one of {', '.join(KINDS)}")
        if not 0 <= self.min_gap < math.inf:
            raise SimpoError(f"min_gap: must be a number of at least 0, not {self.min_gap}")
        if self.max_length_ratio is not None:
            if not self.max_length_ratio >= 1:
                raise SimpoError(f"max_length_ratio: must be at least 1, not {self.max_length_ratio}")
            if self.pairs == "ranking":
                raise SimpoError("max_length_ratio: a ranking has no pairs; leave it out or choose other pairs")


@dataclass
class PairReport:
    """What became of all answers.

    Attributes:
        prompts: with responses.
        rows: made of them.
        dropped: reason -> how many answers, prompts or pairs.
    """

    prompts: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The report for people, a line each."""
        lines = [f"pairs: {self.rows:,} of {self.prompts:,} prompts"]
        return lines + [f"  dropped {count:,} {reason}" for reason, count in self.dropped.items()]


class _Answer(NamedTuple):
    """One answer with its place among the prompt's responses."""

    place: int
    text: str
    score: float


def make_pairs(records: Iterable[Mapping[str, Any]], settings: PairSettings) -> tuple[list[Row], PairReport]:
    """Rows ``{prompt, chosen, rejected, chosen_score, rejected_score, id}``, or ``{prompt, responses, scores, id}``.

    Best against worst is how the paper pairs its own samples (section 4, after Llama-3-Instruct). Of identical answers,
    and of equally good ones, the first counts.

    Args:
        records: ``{id, prompt, responses, scores}``; a score that is None leaves its answer out. ``finished``, where it
            is there, says of every response whether it ended.
        settings: which pairs.
    """
    report = PairReport()
    rows = []
    for record in records:
        report.prompts += 1
        answers = _different(record, settings, report)
        if len(answers) < 2:
            report.dropped[ALIKE] += 1
            continue
        for kept in _compared(answers, record["id"], settings):
            reason = _fault(kept, settings)
            if reason is None:
                rows.append(_row(record, kept, settings))
            else:
                report.dropped[reason] += 1
    report.rows = len(rows)
    return rows, report


def _different(record: Mapping[str, Any], settings: PairSettings, report: PairReport) -> list[_Answer]:
    """The different answers that have a score and may be paired, in their order."""
    found: dict[str, _Answer] = {}
    finished = record.get("finished", [True] * len(record["responses"]))
    for place, (text, score, ended) in enumerate(zip(record["responses"], record["scores"], finished, strict=True)):
        said = text.strip()  # some templates strip messages, so that white space at an end makes no difference
        if score is None:
            report.dropped[UNSCORED] += 1
        elif not (ended or settings.keep_unfinished):
            report.dropped[UNFINISHED] += 1
        elif not said:
            report.dropped[EMPTY] += 1  # which nothing can be trained on
        elif said in found:
            report.dropped[IDENTICAL] += 1
        else:
            found[said] = _Answer(place, text, score)
    return list(found.values())


def _compared(answers: Sequence[_Answer], key: str, settings: PairSettings) -> Iterator[list[_Answer]]:
    """Answers that may make a row, the best first."""
    ranked = sorted(answers, key=lambda answer: -answer.score)  # stable: of equal ones the first is first
    best, worst = ranked[0], min(answers, key=lambda answer: answer.score)
    if settings.pairs == "best_worst":
        yield [best, worst]
    elif settings.pairs == "all":
        yield from map(list, combinations(ranked, 2))
    elif settings.pairs == "best_random":
        worse = [answer for answer in answers if answer.score < best.score]
        yield [best, Random(f"{settings.seed} {key}").choice(worse or [worst])]  # noqa: S311 - sampling, not secrets
    else:
        yield ranked


def _fault(answers: Sequence[_Answer], settings: PairSettings) -> str | None:
    """Why these make no row; None if they do."""
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
    if settings.pairs == "ranking":
        texts, scores = [answer.text for answer in answers], [answer.score for answer in answers]
        return {**_asked(record), "responses": texts, "scores": scores, "id": record["id"]}
    chosen, rejected = answers
    places = f"/{chosen.place}-{rejected.place}" if settings.pairs == "all" else ""
    return {
        **_asked(record),
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
        "id": record["id"] + places,
    }


def _asked(record: Mapping[str, Any]) -> Row:
    """The prompt, with all that training renders it with."""
    return {key: record[key] for key in ("prompt", "tools", "chat_template_kwargs") if key in record}


# ---- The workflow behind ``simpo pair``: annotated responses in, preference data out.


FILE_NAME = "pairs.jsonl"


def pair_annotated(annotated: Path, settings: PairSettings, folder: Path, *, argv: Sequence[str] = ()) -> Path:
    """Write ``pairs.jsonl`` and ``results.json``; a finished run is left as it is.

    Args:
        annotated: ``annotated.jsonl`` of ``simpo annotate``, or its folder.
        settings: which pairs.
        folder: the run's folder.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: something that the user gave cannot be used, or there is no pair at all.
    """
    path = annotated / ANNOTATED if annotated.is_dir() else annotated
    with RunFolder(folder, command="pair") as run:
        records = _read(path)
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

    Args:
        responses: what ``simpo sample`` left: ``responses.jsonl``.
        scorer: from prompt and response to a number; the higher, the better.
        output: the file of pairs, written whole or not at all.
        settings: which pairs; None for the best of every prompt against the worst, of answers that ended.

    Raises:
        SimpoError: a file that cannot be read or written, a score that is no number, or no pair at all.
    """
    records = read_responses(responses)
    for record in records:
        record["scores"] = [scorer(record["prompt"], response) for response in record["responses"]]
        if not all(map(math.isfinite, record["scores"])):
            raise SimpoError(
                f"{responses}: prompt {record['id']}: the scorer gave {record['scores']}; it must give numbers"
            )
    rows, report = make_pairs(records, settings or PairSettings())
    _check_any(rows, report, responses)
    write_lines(output, rows)
    return report


def _read(path: Path) -> list[Row]:
    """Annotated responses.

    Raises:
        SimpoError: as :func:`simpo.judging.annotate.read_responses`, or a row has not one score for every response.
    """
    records = read_responses(path)
    for number, record in enumerate(records, start=1):
        scores = record.get("scores")
        if not isinstance(scores, list) or len(scores) != len(record["responses"]):
            raise SimpoError(f"{path}:{number}: not one score a response; give what simpo annotate leaves")
        if not all(score is None or is_number(score) for score in scores):
            raise SimpoError(f"{path}:{number}: scores: expected numbers or null, got {scores!s:.60}")
        finished = record.get("finished", [True] * len(scores))
        if not isinstance(finished, list) or [type(ended) for ended in finished] != [bool] * len(scores):
            raise SimpoError(f"{path}:{number}: finished: expected true or false for every response")
    return records


def _check_any(rows: Sequence[Row], report: PairReport, path: Path) -> None:
    if not rows:
        remedy = "; raise max_new_tokens, or pair them too with keep_unfinished" if report.dropped[UNFINISHED] else ""
        raise SimpoError(f"{path}: no pairs (dropped {_reasons(report)}){remedy}")


def _reasons(report: PairReport) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())


def _metrics(rows: Sequence[Row], report: PairReport) -> list[Metric]:
    metrics = [Metric("pair/prompts", report.prompts), Metric("pair/rows", report.rows)]
    metrics += [Metric(f"pair/dropped/{_slug(reason)}", count) for reason, count in report.dropped.items()]
    gap = mean_interval([_gap(row) for row in rows])
    metrics.append(Metric.of("pair/score_gap", gap))
    if "chosen" in rows[0]:
        lengths = np.array([[len(row["chosen"]), len(row["rejected"])] for row in rows])
        longer = proportion_interval(int((lengths[:, 0] > lengths[:, 1]).sum()), len(rows))
        metrics.append(Metric.of("pair/chosen_longer", longer))
        for name, values in zip(("chosen", "rejected"), lengths.T, strict=True):
            metrics.append(Metric(f"pair/{name}_characters", float(values.mean()), n=len(rows)))
    return metrics


def _gap(row: Mapping[str, Any]) -> float:
    scores = row.get("scores") or [row["chosen_score"], row["rejected_score"]]
    return float(scores[0] - scores[-1])


def _slug(reason: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", reason).strip("_")
