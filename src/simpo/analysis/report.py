"""``simpo report``: one self-contained HTML file that explains one run, or several next to one another."""

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
from simpo.analysis.headline import deciding, measurements, number
from simpo.analysis.reading import Row, Run, in_order, read_runs
from simpo.errors import SimpoError
from simpo.runs.files import write_text
from simpo.runs.log import utc_now
from simpo.runs.manifest import read_manifest
from simpo.runs.results import Metric, Stage
from simpo.statistics import mean_interval

FILE_NAME = "report.html"
_PAGE = Path(__file__).parent / "page"
_PAGES = Environment(
    loader=FileSystemLoader(_PAGE),
    autoescape=select_autoescape(["html.j2"], ["txt.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters["number"] = number
_PAGES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
_MOST_TRAININGS = 12  # runs in one chart


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of run folders, to ``report.html`` in the first one by default; returns its path."""
    runs = read_runs(paths)
    output = paths[0] / FILE_NAME if output is None else output
    write_text(output, render(runs))
    return output


def render(runs: Sequence[Run]) -> str:
    """The page of one or several runs."""
    several = len(runs) > 1
    trainings = [training for run in runs for training in _trainings(run, several)]
    drawn = trainings[:_MOST_TRAININGS]
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
    return _PAGES.get_template("report.html.j2").render(
        views=[_view(run) for run in runs],
        comparison=_sentences("comparison.txt.j2", several=_several(runs)) if several else [],
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
    """The lines of a template of sentences, each once; they are escaped where a page shows them."""
    return [line for line in dict.fromkeys(_PAGES.get_template(template).render(facts).splitlines()) if line]


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _trainings(run: Run, several: bool) -> list[Run]:
    """The runs whose curves are drawn: the run itself, or the rounds or trials in it; with names for a legend."""
    pattern = {"loop": "round-*/model", "sweep": "trials/*"}.get(run.record.command)
    if pattern is None:
        run.trained.name = run.name if several else run.trained.name
        return [run.trained]
    parts = [part for name, part in run.parts.items() if PurePath(name).match(pattern)]
    for part in parts:
        part.name = f"{run.name}/{part.name}" if several else part.name
    return parts


# ---- The data of each run on the page.


def _view(run: Run) -> Row:
    """The data that the template shows for one run, apart from charts and examples."""
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
        "deciding": deciding(measures),
        "stages": {stage for metrics in table.values() for stage in metrics},
        "table": table,
        "data": [metric for metric in run.trained.metrics if metric.name.startswith("data/")],
        "hashes": {"fingerprint": run.record.fingerprint}
        | {key: value for key, value in identity if re.fullmatch("[0-9a-f]{64}", str(value))},
        "files": files,
        # last: reading the rest may have added some
        "warnings": _sentences("warnings.txt.j2", run=run, several=_several(trials)),
    }


def _several(runs: Sequence[Run]) -> Row:
    """What several runs have in common, and which two of them rank held-out pairs best."""
    found = [(run, run.trained.column("after", "rewards/accuracies")) for run in runs]
    found = [(run, values) for run, values in found if len(values) and not np.isnan(values).any()]
    facts: Row = {
        "kinds": sorted({run.record.command for run in runs}),
        "data": len({run.trained.record.identity.get("data/eval") for run in runs}),
        "objectives": len({run.trained.settings.get("objective") for run in runs}),
        "best": None,
    }
    if len(found) > 1 and len({len(values) for _, values in found}) == 1:
        (best, first), (second, other), *_ = sorted(found, key=lambda pair: -float(pair[1].mean()))
        facts |= {"best": best.name, "second": second.name, "change": mean_interval(first - other)}
    return facts


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The recipe keys in which several runs differ."""
    settings = [run.trained.settings for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one if key not in ("output_dir", "logging_dir", "run_name"))
    rows = {key: [json.dumps(one.get(key), ensure_ascii=False, default=str) for one in settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


# ---- Examples: held-out pairs with their largest gains and losses, and answers before and after.

_LONGEST = 8_000  # characters of a text
_MOST = 120  # answers of a run
_BUDGET = 2_000_000  # characters of all examples as JSON


def examples(runs: Sequence[Run]) -> tuple[list[Row], int]:
    """The examples of all runs for the page's script, and how many were left out to keep the page small."""
    rows, left_out = [], 0
    for run in runs:
        used = answers = 0
        for row in chain(_answers(run), _pairs(run.trained)):
            size, is_answer = len(json.dumps(row)), row["kind"] == "answers"
            if used + size > _BUDGET // len(runs) or (is_answer and answers == _MOST):
                left_out += 1
            else:
                used, answers = used + size, answers + is_answer
                rows.append({"run": run.name, **row})
    return rows, left_out


def _pairs(run: Run) -> list[Row]:
    """The held-out pairs that were written as text, the largest gain in margin first."""
    pairs = []
    for row in run.examples:
        place, responses = row.get("row", 0), row.get("responses", ())
        names = ["chosen", "rejected"] if len(responses) == 2 else [f"response {k + 1}" for k in range(len(responses))]
        scores = {
            stage: rows[place].get("rewards/margins") for stage, rows in run.held_out.items() if place < len(rows)
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
                "place": row.get("where") or f"row {place}",
                "margins": margins,
                "change": round(change, 4),
                "prompt": _side("prompt", [_text(row.get("prompt"))]),
                "sides": sides,
            }
        )
    return sorted(pairs, key=lambda pair: -pair["change"])


def _answers(run: Run) -> Iterator[Row]:
    """Answers to the same prompts before and after, or of a comparison's models, the clearest verdicts first."""
    names = ("A", "B") if run.record.command == "compare" else ("after", "before")
    of_rounds = sorted(run.path.glob("round-*/comparison/verdicts.jsonl"), key=in_order)
    for path in [run.path / "verdicts.jsonl", *of_rounds[-1:]]:
        rows = run.lines(path.relative_to(run.path).as_posix())
        for row in sorted(rows, key=lambda row: -abs(sum(value - 0.5 for value in _verdicts(row).values()))):
            yield _answer(row, dict(zip(names, (row.get("a"), row.get("b")), strict=True)), _verdicts(row))
    steps = sorted(run.path.glob("generations/step-*.jsonl"), key=in_order)
    files = [("generations/start.jsonl", f"generations/{step.name}") for step in steps[-1:]]
    for before, after in [("sft-answers/responses.jsonl", "simpo-answers/responses.jsonl"), *files]:  # first, a demo's
        later = {row.get("id"): row for row in run.lines(after)}
        for row in run.lines(before) if later else ():
            answers = {"before": row, "after": later.get(row.get("id"), {})}
            yield _answer(row, {stage: (one.get("responses") or [None])[0] for stage, one in answers.items()}, {})


def _verdicts(row: Row) -> dict[str, float]:
    return {judge: value for judge, value in row.get("verdicts", {}).items() if value is not None}


def _answer(row: Row, answers: dict[str, Any], verdicts: dict[str, float]) -> Row:
    """An answer of each of two models to one prompt; a verdict is 1 if the first is better, 0 if the second is."""
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
    """A text by its tokens as far as it is shown, with their log-probabilities before and after."""
    shown, room = [], _LONGEST
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
    """A text; a conversation turn by turn."""
    if isinstance(value, list):
        return "\n".join(
            f"{turn.get('role', '')}: {turn.get('content', '')}" if isinstance(turn, dict) else str(turn)
            for turn in value
        )
    return "" if value is None else str(value)
