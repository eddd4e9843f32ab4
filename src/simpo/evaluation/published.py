"""What others measured: the paper's models on the same benchmarks, to stand beside one's own figures.

Source: the tables of released models in the paper's repository, princeton-nlp/SimPO, README.md. Judge and versions are
those of its time: gpt-4-1106-preview, AlpacaEval 2 and Arena-Hard v0.1; GSM8K and MMLU by ZeroEval.
"""

from __future__ import annotations

import csv
from importlib import resources

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

SOURCE = "princeton-nlp/SimPO, README.md: judge gpt-4-1106-preview; GSM8K and MMLU by ZeroEval"
# Methods that are shown on a terminal; an export has all.
_SHOWN = ("SFT", "DPO", "SimPO")
# Columns by benchmark, and what they are called.
_COLUMNS = {
    "alpaca_eval": {"alpaca_eval_lc": "LC win rate", "alpaca_eval_wr": "win rate", "alpaca_eval_length": "length"},
    "arena_hard": {"arena_hard": "Arena-Hard v0.1"},
    "gsm8k": {"gsm8k": "GSM8K"},
    "academic": {"gsm8k": "GSM8K", "mmlu": "MMLU"},
}


def published_rows(benchmark: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the published figures of a benchmark; no rows where nothing is published."""
    columns = _COLUMNS.get(benchmark, {})
    text = (resources.files("simpo.evaluation") / "published.csv").read_text(encoding="utf-8")
    rows = [
        [row["setting"], row["method"], row["model"], *(row[column] for column in columns)]
        for row in csv.DictReader(text.splitlines())
        if any(row[column] for column in columns)
    ]
    return ["setting", "method", "model", *columns.values()], rows


def published_table(benchmark: str) -> Table | None:
    """The figures of the main methods for a terminal; None where there are none."""
    (setting, method, _, *columns), rows = published_rows(benchmark)
    if not rows:
        return None
    table = Table(setting, method, title="published", caption=Text(SOURCE), box=SIMPLE_HEAD)
    for heading in columns:
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        if row[1] in _SHOWN:
            table.add_row(*map(Text, (row[0], row[1], *row[3:])))
    return table
