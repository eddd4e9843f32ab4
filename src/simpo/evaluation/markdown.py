"""Figures of an evaluation, and what others published, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpo.atomic import write_text
from simpo.evaluation.published import SOURCE, published_rows
from simpo.results import Metric, read_results
from simpo.runs.record import RunRecord


def write_markdown(results: Path, benchmark: str, model: str, path: Path) -> None:
    """Write the figures of a run, who judged, and the published figures to a Markdown file.

    Args:
        results: the run's ``results.json``, beside its ``run.json``.
        benchmark: its name on the command line.
        model: what the heading calls the model.
        path: the file to write.

    Raises:
        SimpoError: the results cannot be read, or the file cannot be written.
    """
    found = read_results(results)
    own = [_cells(metric) for metric in found.metrics]
    parts = [f"## {model} on {benchmark}", _table(["metric", "stage", "value", "interval", "n"], own)]
    identity = RunRecord.read(results.parent).identity
    if "judge" in identity:
        parts.append(f"Judge: {identity['judge']}")
    if "judge_prompt" in identity:
        parts.append(f"SHA-256 of the judge prompt: `{identity['judge_prompt']}`")
    headings, rows = published_rows(benchmark)
    if rows:
        parts += [f"Published ({SOURCE}):", _table(headings, rows)]
    write_text(path, "\n\n".join([*parts, f"Fingerprint of the run: `{found.fingerprint}`"]) + "\n")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _cells(metric: Metric) -> list[str]:
    interval = ""
    if metric.low is not None and metric.high is not None:
        interval = f"{metric.low:.4g} to {metric.high:.4g} ({metric.method})"
    value = "-" if metric.value is None else f"{metric.value:.4g}"
    return [metric.name, metric.stage or "", value, interval, "" if metric.n is None else str(metric.n)]
