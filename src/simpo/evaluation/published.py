"""Published results of the same benchmarks, most of them by the paper's authors, and results as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from simpo.runs.atomic import write_text
from simpo.runs.folder import RunRecord
from simpo.runs.results import read_results

_README = "princeton-nlp/SimPO, README.md: judge gpt-4-1106-preview; GSM8K and MMLU by ZeroEval"
# An empty cell was not legible in the copy of the paper's tables. For RRHF, SLiC-HF, R-DPO, KTO and CPO the repository
# has other AlpacaEval and Arena-Hard figures than the paper; those of the repository are shown.
_PAPER = "arXiv 2405.14734, tables 4 and 5: scores from 1 to 10"
_SOURCES = {"mt_bench": _PAPER, "alpaca_eval": f"{_README}; ablations: arXiv 2405.14734, table 5"}
_SOURCES["arena_hard"] = _SOURCES["alpaca_eval"]
_SOURCES["rewardbench"] = "model cards of the allenai/*-RM-RB2 models, revision main"
# The methods that are shown on a terminal; an export has all of them.
_SHOWN = ("SFT", "DPO", "SimPO", "reward model")
_REWARDBENCH = ("score", "Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
# The columns of published.csv by benchmark, and their headings.
_COLUMNS = {
    "alpaca_eval": {"alpaca_eval_lc": "LC win rate", "alpaca_eval_wr": "win rate", "alpaca_eval_length": "length"},
    "arena_hard": {"arena_hard": "Arena-Hard v0.1"},
    "gsm8k": {"gsm8k": "GSM8K"},
    "mt_bench": {"mt_bench_gpt4_turbo": "judge GPT-4 Turbo", "mt_bench_gpt4": "judge GPT-4"},
    "academic": {"gsm8k": "GSM8K", "mmlu": "MMLU"},
    "rewardbench": {f"rewardbench_{name.lower().replace(' ', '_')}": name for name in _REWARDBENCH},
}


def published_rows(benchmark: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the published results of a benchmark; no rows where nothing is published."""
    columns = _COLUMNS.get(benchmark, {})
    text = (resources.files("simpo.evaluation") / "published.csv").read_text(encoding="utf-8")
    rows = [
        [row["setting"], row["method"], row["model"], *(row[column] for column in columns)]
        for row in csv.DictReader(text.splitlines())
        if any(row[column] for column in columns)
    ]
    return ["setting", "method", "model", *columns.values()], rows


def published_table(benchmark: str) -> Table | None:
    """The published results of the main methods for a terminal; None where there are none."""
    (setting, method, _, *columns), rows = published_rows(benchmark)
    if not rows:
        return None
    table = Table(setting, method, title="published", caption=Text(_SOURCES.get(benchmark, _README)), box=SIMPLE_HEAD)
    for heading in columns:
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        if row[1] in _SHOWN:
            table.add_row(*map(Text, (row[0], row[1], *row[3:])))
    return table


def write_markdown(results: Path, benchmark: str, model: str, path: Path) -> None:
    """Write the results of a run, its judge, and the published results to a Markdown file.

    Args:
        results: ``results.json`` of the run, next to its ``run.json``.
        benchmark: its name on the command line.
        model: the name of the model in the heading.
        path: the file to write.
    """
    found = read_results(results)
    rows = []
    for metric in found.metrics:
        interval = ""
        if metric.low is not None and metric.high is not None:
            interval = f"{metric.low:.4g} to {metric.high:.4g} ({metric.method})"
        value = "-" if metric.value is None else f"{metric.value:.4g}"
        rows.append([metric.name, metric.stage or "", value, interval, "" if metric.n is None else str(metric.n)])
    parts = [f"## {model} on {benchmark}", _markdown_table(["metric", "stage", "value", "interval", "n"], rows)]
    identity = RunRecord.read(results.parent).identity
    if "judge" in identity:
        parts.append(f"Judge: {identity['judge']}")
    if "judge_prompt" in identity:
        parts.append(f"SHA-256 of the judge prompt: `{identity['judge_prompt']}`")
    headings, published = published_rows(benchmark)
    if published:
        parts += [f"Published ({_SOURCES.get(benchmark, _README)}):", _markdown_table(headings, published)]
    write_text(path, "\n\n".join([*parts, f"Fingerprint of the run: `{found.fingerprint}`"]) + "\n")


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
