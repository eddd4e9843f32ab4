"""The workflow behind ``simpo pair``: annotated responses in, preference data out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simpo.data.formats import is_number
from simpo.errors import SimpoError
from simpo.judges.annotate import FILE_NAME as ANNOTATED
from simpo.judges.annotate import read_responses
from simpo.results import Metric, fingerprint, write_results
from simpo.runs.folder import RunFolder
from simpo.runs.lines import write_lines
from simpo.sampling.pairs import UNFINISHED, PairReport, PairSettings, Row, make_pairs
from simpo.statistics import mean_interval, proportion_interval

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
            run.say(line)
        _check_any(rows, report, path)
        run.begin({"annotated": fingerprint(records), **dataclasses.asdict(settings)}, argv=argv, accept_changes=None)
        if run.finished:
            run.say(f"{folder} holds this run already, finished")
        else:
            write_lines(folder / FILE_NAME, rows)
            metrics = _metrics(rows, report)
            write_results(folder, command="pair", fingerprint=run.fingerprint, metrics=metrics)
            run.finish()
    return folder / "results.json"


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
        SimpoError: as :func:`simpo.judges.annotate.read_responses`, or a row has not one score for every response.
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
    metrics.append(Metric("pair/score_gap", gap.value, None, gap.n, gap.low, gap.high, gap.method))
    if "chosen" in rows[0]:
        lengths = np.array([[len(row["chosen"]), len(row["rejected"])] for row in rows])
        longer = proportion_interval(int((lengths[:, 0] > lengths[:, 1]).sum()), len(rows))
        metrics.append(
            Metric("pair/chosen_longer", longer.value, None, longer.n, longer.low, longer.high, longer.method)
        )
        for name, values in zip(("chosen", "rejected"), lengths.T, strict=True):
            metrics.append(Metric(f"pair/{name}_characters", float(values.mean()), n=len(rows)))
    return metrics


def _gap(row: Mapping[str, Any]) -> float:
    scores = row.get("scores") or [row["chosen_score"], row["rejected_score"]]
    return float(scores[0] - scores[-1])


def _slug(reason: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", reason).strip("_")
