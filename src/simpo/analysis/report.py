"""``simpo report``: a self-contained HTML file that explains a run, or compares several."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from simpo import __version__
from simpo.analysis.charts import by_distance, curves, paper_figures, rounds
from simpo.analysis.headline import deciding_measure, format_interval, measurements
from simpo.analysis.reading import Row, Run, natural_key, read_runs
from simpo.errors import SimpoError
from simpo.runs.files import write_text
from simpo.runs.log import utc_now
from simpo.runs.manifest import read_manifest
from simpo.runs.results import Metric, Stage
from simpo.statistics import mean_interval

FILE_NAME = "report.html"
_PAGE = Path(__file__).parent / "page"
_TEMPLATES = Environment(
    loader=FileSystemLoader(_PAGE),
    autoescape=select_autoescape(["html.j2"], ["txt.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["format_interval"] = format_interval
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
_MAX_TRAININGS = 12  # runs in one chart


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one or more run folders and return its path, by default ``report.html`` in the first one."""
    runs = read_runs(paths)
    output = paths[0] / FILE_NAME if output is None else output
    write_text(output, render(runs))
    return output


def render(runs: Sequence[Run]) -> str:
    """Render the page for one or more runs."""
    several = len(runs) > 1
    trainings = [training for run in runs for training in _trainings(run, several)]
    drawn = trainings[:_MAX_TRAININGS]
    compared = drawn if [run.record.command for run in runs] == ["sweep"] else runs
    sections = [
        ("curves", "Curves", [*(chart for run in runs for chart in rounds(run)), *by_distance(drawn), *curves(drawn)])
    ]
    for place, run in enumerate(runs):
        part = [] if run.trained is run else [run.trained.path.relative_to(run.path).as_posix()]
        title = ": ".join(filter(None, ("The paper's figures", "/".join([run.name] * several + part))))
        sections.append((f"figures-{place}", title, list(paper_figures(run.trained))))
    shown, left_out = examples(runs)
    data = {
        "charts": {f"{name}-{place}": chart for name, _, charts in sections for place, chart in enumerate(charts)},
        "runs": [run.name for run in drawn],
        "examples": shown,
    }
    names = ("report.js", "echarts.common.min.js", "report.css")
    script, charting, style = ((_PAGE / name).read_text(encoding="utf-8") for name in names)
    return _TEMPLATES.get_template("report.html.j2").render(
        views=[_view(run) for run in runs],
        comparison=_sentences("comparison.txt.j2", several=_comparison(runs)) if several else [],
        compared=[run.name for run in compared],
        differences=_differences(compared),
        sections=[(name, title, charts) for name, title, charts in sections if charts],
        trainings=len(trainings),
        drawn=len(drawn),
        examples=shown,
        left_out=left_out,
        style=Markup(style),  # noqa: S704 - our own files
        scripts=[Markup(charting), Markup(script)],  # noqa: S704
        hashes=[_csp_hash(charting), _csp_hash(script)],
        data=data,
        version=__version__,
        written=utc_now(),
    )


def _sentences(template: str, **facts: Any) -> list[str]:
    """Render a template with one sentence per line and return the distinct sentences, not yet escaped for HTML."""
    return [line for line in dict.fromkeys(_TEMPLATES.get_template(template).render(facts).splitlines()) if line]


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _trainings(run: Run, several: bool) -> list[Run]:
    """Return the runs whose curves are plotted (the run itself, or its rounds or trials), named for the legend."""
    pattern = {"loop": "round-*/model", "sweep": "trials/*"}.get(run.record.command)
    if pattern is None:
        run.trained.name = run.name if several else run.trained.name
        return [run.trained]
    parts = [part for name, part in run.parts.items() if PurePath(name).match(pattern)]
    for part in parts:
        part.name = f"{run.name}/{part.name}" if several else part.name
    return parts


# ---- What the page shows about each run.


def _view(run: Run) -> Row:
    """Collect the template variables for one run, apart from charts and examples."""
    table: dict[str, dict[Stage | None, Metric]] = {}
    for metric in run.metrics or run.trained.metrics:
        if not metric.name.startswith("data/"):
            table.setdefault(metric.name, {})[metric.stage] = metric
    measures, files = measurements(run), []
    with suppress(FileNotFoundError, SimpoError):
        files = read_manifest(run.path)
    identity = run.trained.record.identity.items()
    trials = [part for part in run.parts.values() if part.finished] if run.record.command == "sweep" else []
    return {
        "run": run,
        "measures": measures,
        "deciding": deciding_measure(measures),
        "stages": {stage for metrics in table.values() for stage in metrics},
        "table": table,
        "data": [metric for metric in run.trained.metrics if metric.name.startswith("data/")],
        "hashes": {"fingerprint": run.record.fingerprint}
        | {key: value for key, value in identity if re.fullmatch("[0-9a-f]{64}", str(value))},
        "files": files,
        # Last, because reading the files above may have added warnings.
        "warnings": _sentences("warnings.txt.j2", run=run, several=_comparison(trials)),
    }


def _comparison(runs: Sequence[Run]) -> Row:
    """Determine whether several runs are comparable, and which two of them rank held-out pairs best."""
    scored = [(run, run.trained.column("after", "rewards/accuracies")) for run in runs]
    scored = [(run, values) for run, values in scored if len(values) and not np.isnan(values).any()]
    facts: Row = {
        "kinds": sorted({run.record.command for run in runs}),
        "data": len({run.trained.record.identity.get("data/eval") for run in runs}),
        "objectives": len({run.trained.settings.get("objective") for run in runs}),
        "best": None,
    }
    if len(scored) > 1 and len({len(values) for _, values in scored}) == 1:
        (best, best_values), (second, values), *_ = sorted(scored, key=lambda pair: -float(pair[1].mean()))
        facts |= {"best": best.name, "second": second.name, "change": mean_interval(best_values - values)}
    return facts


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the recipe keys in which the runs differ, with each run's value."""
    settings = [run.trained.settings for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one if key not in ("output_dir", "logging_dir", "run_name"))
    rows = {key: [json.dumps(one.get(key), ensure_ascii=False, default=str) for one in settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


# ---- Examples: held-out pairs, and answers before and after.

_MAX_TEXT = 8_000  # characters per text
_MAX_ANSWERS = 120  # per run
_BUDGET = 2_000_000  # characters of JSON for all examples together


def examples(runs: Sequence[Run]) -> tuple[list[Row], int]:
    """Return the examples of all runs for the page's script, and how many were left out to keep the page small."""
    rows, left_out = [], 0
    for run in runs:
        used = answers = 0
        for row in chain(_answers(run), _pairs(run.trained)):
            size, is_answer = len(json.dumps(row)), row["kind"] == "answers"
            if used + size > _BUDGET // len(runs) or (is_answer and answers == _MAX_ANSWERS):
                left_out += 1
            else:
                used, answers = used + size, answers + is_answer
                rows.append({"run": run.name, **row})
    return rows, left_out


def _pairs(run: Run) -> list[Row]:
    """Return the held-out pairs that were stored as text, sorted by gain in margin, largest first."""
    pairs = []
    for row in run.examples:
        index, responses = row.get("row", 0), row.get("responses", ())
        names = ["chosen", "rejected"] if len(responses) == 2 else [f"response {k + 1}" for k in range(len(responses))]
        scores = {
            stage: rows[index].get("rewards/margins") for stage, rows in run.held_out.items() if index < len(rows)
        }
        margins = {stage: round(value, 4) for stage, value in scores.items() if isinstance(value, int | float)}
        change = margins["after"] - margins["before"] if len(margins) == 2 else 0.0
        sides = [
            _side(name, one.get("texts", ()), before=one.get("logps"), after=one.get("after"))
            for name, one in zip(names, responses, strict=True)
        ]
        pairs.append(
            {
                "kind": "pair",
                "place": row.get("where") or f"row {index}",
                "margins": margins,
                "change": round(change, 4),
                "prompt": _side("prompt", [_text(row.get("prompt"))]),
                "sides": sides,
            }
        )
    return sorted(pairs, key=lambda pair: -pair["change"])


def _answers(run: Run) -> Iterator[Row]:
    """Yield answers to the same prompts before and after, or from the compared models, clearest verdicts first."""
    names = ("A", "B") if run.record.command == "compare" else ("after", "before")
    round_files = sorted(run.path.glob("round-*/comparison/verdicts.jsonl"), key=natural_key)
    for path in [run.path / "verdicts.jsonl", *round_files[-1:]]:
        rows = run.lines(path.relative_to(run.path).as_posix())
        for row in sorted(rows, key=lambda row: -abs(sum(value - 0.5 for value in _verdicts(row).values()))):
            yield _answer(row, dict(zip(names, (row.get("a"), row.get("b")), strict=True)), _verdicts(row))
    steps = sorted(run.path.glob("generations/step-*.jsonl"), key=natural_key)
    during_training = [("generations/start.jsonl", f"generations/{step.name}") for step in steps[-1:]]
    of_demo = ("sft-answers/responses.jsonl", "simpo-answers/responses.jsonl")
    for before, after in [of_demo, *during_training]:
        after_by_id = {row.get("id"): row for row in run.lines(after)}
        for row in run.lines(before) if after_by_id else ():
            answers = {"before": row, "after": after_by_id.get(row.get("id"), {})}
            yield _answer(row, {stage: (one.get("responses") or [None])[0] for stage, one in answers.items()}, {})


def _verdicts(row: Row) -> dict[str, float]:
    return {judge: value for judge, value in row.get("verdicts", {}).items() if value is not None}


def _answer(row: Row, answers: dict[str, Any], verdicts: dict[str, float]) -> Row:
    """Build an example from two models' answers to a prompt; a verdict is 1 if the first wins, 0 if the second does."""
    first, second = (f"{name} is better" for name in answers)
    return {
        "kind": "answers",
        "place": str(row.get("where") or row.get("id") or ""),
        "verdicts": {
            judge: first if value > 0.5 else second if value < 0.5 else "a tie" for judge, value in verdicts.items()
        },
        "prompt": _side("prompt", [_text(row.get("prompt"))]),
        "sides": [_side(name, [_text(text)]) for name, text in answers.items()],
    }


def _side(name: str, texts: Sequence[str], **logps: Sequence[float | None] | None) -> Row:
    """Build one text of an example from its tokens, cut to a maximum length, with log-probabilities per token."""
    shown, room = [], _MAX_TEXT
    for text in texts:
        if room > 0:
            shown.append(text[:room])
        room -= len(text)
    numbers = {
        stage: [None if value is None else round(value, 2) for value in values[: len(shown)]]
        for stage, values in logps.items()
        if values
    }
    return {"name": name, "texts": shown, "cut": max(0, -room), **numbers}


def _text(value: Any) -> str:
    """Convert a prompt or answer to text; a conversation becomes one line per turn."""
    if isinstance(value, list):
        return "\n".join(
            f"{turn.get('role', '')}: {turn.get('content', '')}" if isinstance(turn, dict) else str(turn)
            for turn in value
        )
    return "" if value is None else str(value)
