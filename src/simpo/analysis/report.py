"""``simpo report``: one self-contained HTML file that explains one run, or several next to one another."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from simpo import __version__
from simpo.analysis.charts import by_distance, curves, paper_figures, rounds
from simpo.analysis.headline import Headline, Measure, cautions, compare_runs, facts_of, number, trained_run
from simpo.analysis.reading import Row, Run, in_order, read_runs
from simpo.errors import SimpoError
from simpo.runs.files import write_text
from simpo.runs.log import utc_now
from simpo.runs.manifest import read_manifest
from simpo.runs.results import Metric, Stage

FILE_NAME = "report.html"
_PAGE = Path(__file__).parent / "page"
_MOST_TRAININGS = 12  # runs in one chart
_MOST_FILES = 200
# Columns of the table of results: of a comparison, A is the model and B what it is compared with.
_STAGES: dict[Stage | None, str] = {None: "value", "before": "before", "after": "after"}
_SIDES: dict[Stage | None, str] = {None: "value", "after": "A", "before": "B"}
# Counts of rows that are worth a warning.
_ROWS = {
    "bad": "cannot be used",
    "dropped": "were dropped",
    "cut": "were cut",
    "rows_in_train": "are also training rows",
    "prompts_in_train": "have a prompt that is also trained on",
}


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of run folders, to ``report.html`` in the first one by default; returns its path."""
    runs = read_runs(paths)
    output = paths[0] / FILE_NAME if output is None else output
    write_text(output, render(runs))
    return output


def render(runs: Sequence[Run]) -> str:
    """The page of one or several runs."""
    trainings = [training for run in runs for training in _trainings(run, several=len(runs) > 1)]
    shown, left_out = examples(runs)
    compared = trainings[:_MOST_TRAININGS] if [run.record.command for run in runs] == ["sweep"] else runs
    figures = [(_heading(run, several=len(runs) > 1), list(paper_figures(trained_run(run)))) for run in runs]
    drawn = trainings[:_MOST_TRAININGS]
    sections = [
        ("curves", "Curves", [*(chart for run in runs for chart in rounds(run)), *by_distance(drawn), *curves(drawn)]),
        *(
            (f"figures-{place}", "The paper's figures" + (f": {name}" if name else ""), charts)
            for place, (name, charts) in enumerate(figures)
        ),
    ]
    notes = (
        [f"{len(trainings):,} trainings, of which the first {_MOST_TRAININGS} are drawn."]
        if len(trainings) > _MOST_TRAININGS
        else []
    )
    names = ("report.js", "echarts.common.min.js", "report.css")
    script, charting, style = ((_PAGE / name).read_text(encoding="utf-8") for name in names)
    data = {
        "charts": {f"{name}-{place}": chart for name, _, charts in sections for place, chart in enumerate(charts)},
        "examples": shown,
    }
    pages = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template("report.html.j2").render(
        runs=[_described(run) for run in runs],
        comparison=list(compare_runs(runs)) if len(runs) > 1 else [],
        compared=[run.name for run in compared],
        differences=_differences(compared),
        sections=[(name, title, charts) for name, title, charts in sections if charts],
        curve_notes=notes,
        example_count=len(shown),
        pairs_shown=any(row["kind"] == "pair" for row in shown),
        examples_left_out=left_out,
        style=Markup(style),  # noqa: S704 - our own files
        scripts=[Markup(charting), Markup(script)],  # noqa: S704
        hashes=[_csp_hash(charting), _csp_hash(script)],
        data=Markup(_embedded(data)),  # noqa: S704 - escaped
        version=__version__,
        written=utc_now(),
    )


def _heading(run: Run, *, several: bool) -> str:
    """The heading of a run's figures: its name among several runs, and the part of it that the figures are of."""
    trained = trained_run(run)
    part = "" if trained is run else trained.path.relative_to(run.path).as_posix()
    return "/".join([*([run.name] if several else []), *([part] if part else [])])


def _trainings(run: Run, *, several: bool) -> list[Run]:
    """The runs whose curves are drawn: the run itself, or the rounds or trials in it."""
    places = {"loop": "round-*/model", "sweep": "trials/*"}
    if (pattern := places.get(run.record.command)) is None:
        trained = trained_run(run)
        trained.name = run.name if several else trained.name
        return [trained]
    parts = [part for name, part in run.parts.items() if PurePath(name).match(pattern)]
    for part in parts:
        part.name = f"{run.name}/{part.name}" if several else part.name
    return parts


# ---- What the page says of each run.


def _described(run: Run) -> Row:
    """Everything of a run that the template shows, apart from charts and examples."""
    trained, headline, files = trained_run(run), Headline.of(run), _files(run.path)
    metrics = [metric for metric in run.metrics or trained.metrics if not metric.name.startswith("data/")]
    names = _SIDES if run.record.command == "compare" else _STAGES
    stages = {stage: name for stage, name in names.items() if any(metric.stage == stage for metric in metrics)}
    described = {
        "name": run.name,
        "path": str(run.path),
        "command": run.record.command,
        "finished": run.finished,
        "started": run.record.starts[0] if run.record.starts else None,
        "headline": headline,
        "bars": [_bar(one) for one in headline.measures[:4]],
        "facts": facts_of(run),
        "stages": stages,
        "metrics": _table(metrics, stages),
        "data": [metric for metric in trained.metrics if metric.name.startswith("data/")],
        "command_line": run.command_line,
        "recipe": _without_first_line(trained.text("recipe.yaml")),
        "resolved": trained.text("recipe.resolved.yaml"),
        "environment": yaml.safe_dump(trained.environment, sort_keys=False) if trained.environment else "",
        "hashes": {"fingerprint": run.record.fingerprint}
        | {key: value for key, value in trained.record.identity.items() if re.fullmatch("[0-9a-f]{64}", str(value))},
        "files": files[:_MOST_FILES],
        "more_files": max(0, len(files) - _MOST_FILES),
    }
    return described | {"warnings": _warnings(run, trained)}  # last: reading the rest may have added some


def _bar(measure: Measure) -> Row:
    """A measurement as dots and intervals on an axis, in percent of its width; shares have the axis from 0 to 1."""
    found = [(stage, one) for stage, one in (("before", measure.before), ("after", measure.after)) if one is not None]
    even = measure.even if measure.before is None else None
    ends = [end for _, one in found for end in (one.value, one.low, one.high) if end is not None]
    ends += [] if even is None else [even]
    low, high = min(ends), max(ends)
    space = 0.15 * (high - low) or 1.0
    low, high = (0.0, 1.0) if measure.share else (low - space, high + space)

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / (high - low), 2)

    rows = [
        {"stage": stage, "text": measure.text(one)}
        | {key: place(getattr(one, key)) for key in ("value", "low", "high")}
        for stage, one in found
    ]
    return {"rows": rows, "even": place(even), "measure": measure}


def _table(metrics: Sequence[Metric], stages: Iterable[Stage | None]) -> list[tuple[str, list[str], str]]:
    """Rows of the table of results: name, the value at each stage, and n."""
    rows: dict[str, dict[Any, Metric]] = {}
    for metric in metrics:
        rows.setdefault(metric.name, {})[metric.stage] = metric
    table = []
    for name, cells in rows.items():
        counts = dict.fromkeys(f"{one.n:,}" for one in cells.values() if one.n is not None)
        table.append((name, [_cell(cells.get(stage)) for stage in stages], " / ".join(counts)))
    return table


def _cell(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return "" if metric is None else "none"
    return number(metric.interval)


def _warnings(run: Run, trained: Run) -> list[str]:
    """Everything that a reader of the numbers should know, in sentences."""
    found = []
    if not run.finished:
        found.append(f"This run has not finished. {run.error or 'The page shows it as far as it has come.'}")
    for metric in trained.metrics:
        parts = metric.name.split("/")
        if parts[0] == "data" and len(parts) == 3 and metric.value and parts[2] in _ROWS:
            of = "" if metric.n is None else f" of {metric.n:,}"
            found.append(f"{metric.value:,.0f}{of} rows of the {parts[1]} data {_ROWS[parts[2]]}.")
    if len(run.record.starts) > 1:
        found.append(f"The run was started {len(run.record.starts):,} times: it was stopped and continued.")
    for change in run.record.changes:
        found.append(f"Continued with other settings ({', '.join(change.get('now', {}))}) on {change.get('time')}.")
    logged = ((key, value) for log in trained.logs for key, value in log.items() if key not in ("step", "epoch"))
    if not_finite := sorted({key for key, value in logged if value is None}):
        found.append(f"Not finite in the log (NaN or infinite): {', '.join(not_finite)}.")
    if run.record.command == "sweep" and trained is not run:
        found += compare_runs([part for part in run.parts.values() if part.finished])
        found.append(
            "The best trial was chosen by the held-out rows that its figures are computed on, which makes it look "
            "better than it is. Evaluate it on other rows to see how good it really is."
        )
    found += cautions(run)
    for one in (run,) if run is trained else (run, trained):
        found += one.missing + one.notices
    return list(dict.fromkeys(found))


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The recipe keys in which several runs differ."""
    settings = [trained_run(run).settings for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one if key not in ("output_dir", "logging_dir", "run_name"))
    rows = [(key, [json.dumps(one.get(key), ensure_ascii=False, default=str) for one in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1] if len(runs) > 1 else []


def _files(folder: Path) -> list[tuple[str, int, str]]:
    try:
        return read_manifest(folder)
    except (FileNotFoundError, SimpoError):
        return []


def _without_first_line(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(line for place, line in enumerate(lines) if place or not line.startswith("# simpo")).strip()


# ---- The page.


def _embedded(value: Any) -> str:
    """JSON for a script element: without ``<``, nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ---- Examples: held-out pairs with their largest gains and losses, and answers before and after.

_LONGEST = 8_000  # characters of a text
_MOST = 120  # answers of a run
_BUDGET = 2_000_000  # characters of all examples as JSON


def examples(runs: Sequence[Run]) -> tuple[list[Row], str]:
    """The examples of all runs for the page's script, and what was left out of them, in a sentence."""
    found = [chain(_answers(run), _pairs(trained_run(run))) for run in runs]
    rows, left_out = [], 0
    share = _BUDGET // max(1, len(runs))
    for run, of_run in zip(runs, found, strict=True):
        used = answers = 0
        for row in of_run:
            size, is_answer = len(json.dumps(row)), row["kind"] == "answers"
            if used + size > share or (is_answer and answers == _MOST):
                left_out += 1
            else:
                used, answers = used + size, answers + is_answer
                rows.append({"run": run.name, **row})
    return rows, f"{left_out:,} examples were left out to keep this page small." if left_out else ""


# ---- Pairs.


def _pairs(run: Run) -> Iterator[Row]:
    """The held-out pairs that were written as text, the largest gain first."""
    pairs = []
    for row in run.examples:
        number, responses = row.get("row", 0), row.get("responses", ())
        names = ["chosen", "rejected"] if len(responses) == 2 else [f"response {k + 1}" for k in range(len(responses))]
        scores = {stage: rows[number] for stage, rows in run.held_out.items() if number < len(rows)}
        found = {stage: row.get("rewards/margins") for stage, row in scores.items()}
        margins = {stage: round(value, 4) for stage, value in found.items() if isinstance(value, int | float)}
        change = margins["after"] - margins["before"] if len(margins) == 2 else 0.0
        sides = [_tokens(name, response) for name, response in zip(names, responses, strict=True)]
        pairs.append(
            {
                "kind": "pair",
                "place": row.get("where") or f"row {number}",
                "margins": margins,
                "change": round(change, 4),
                **_cut("prompt", row.get("prompt")),
                "sides": sides,
            }
        )
    yield from sorted(pairs, key=lambda pair: -pair["change"])


def _tokens(name: str, response: Mapping[str, Any]) -> Row:
    """A response by its tokens, with their log-probabilities before and after, as far as it is shown."""
    texts, room = [], _LONGEST
    for text in response.get("texts", ()):
        if not room:
            break
        texts.append(text[:room])
        room -= len(texts[-1])
    cut = sum(map(len, response.get("texts", ()))) - sum(map(len, texts))
    stages = {stage: response.get(key) for stage, key in (("before", "logps"), ("after", "after"))}
    logps = {
        stage: [value if value is None else round(value, 2) for value in values[: len(texts)]]
        for stage, values in stages.items()
        if values
    }
    return {"name": name, "texts": texts, "cut": cut, **logps}


# ---- Answers.


def _answers(run: Run) -> Iterator[Row]:
    """Answers to the same prompts before and after, or of the two models of a comparison."""
    of_rounds = sorted(run.path.glob("round-*/comparison/verdicts.jsonl"), key=in_order)
    verdicts = [run.path / "verdicts.jsonl", *of_rounds[-1:]]
    a, b = ("A", "B") if run.record.command == "compare" else ("after", "before")
    for path in verdicts:
        rows = run.lines(path.relative_to(run.path).as_posix())
        rows.sort(
            key=lambda row: (
                -abs(sum((value if value is not None else 0.5) - 0.5 for value in row.get("verdicts", {}).values()))
            )
        )
        for row in rows:
            judged = {name: value for name, value in row.get("verdicts", {}).items() if value is not None}
            yield _answer(row, (a, row.get("a")), (b, row.get("b")), judged)
    for before, after in _answer_files(run):
        later = {row.get("id"): row for row in run.lines(after.relative_to(run.path).as_posix())}
        for row in run.lines(before.relative_to(run.path).as_posix()):
            other = later.get(row.get("id"), {}).get("responses") or [None]
            yield _answer(row, ("before", (row.get("responses") or [None])[0]), ("after", other[0]), {})


def _answer_files(run: Run) -> Iterator[tuple[Path, Path]]:
    demo = run.path / "sft-answers/responses.jsonl", run.path / "simpo-answers/responses.jsonl"
    steps = sorted((run.path / "generations").glob("step-*.jsonl"), key=lambda path: int(path.stem[5:]))
    for before, after in (demo, *((run.path / "generations/start.jsonl", step) for step in steps[-1:])):
        if before.exists() and after.exists():
            yield before, after


def _answer(row: Row, first: tuple[str, Any], second: tuple[str, Any], verdicts: Mapping[str, float]) -> Row:
    """An answer of each of two models to one prompt; a verdict is 1 if the first is better, 0 if the second is."""
    sides = []
    for name, text in (first, second):
        cut = _cut("text", text)
        sides.append({"name": name, "texts": [cut["text"]], "cut": cut["text_cut"]})
    better = {1: f"{first[0]} is better", -1: f"{second[0]} is better", 0: "a tie"}
    return {
        "kind": "answers",
        "place": str(row.get("where") or row.get("id") or ""),
        "verdicts": {judge: better[(value > 0.5) - (value < 0.5)] for judge, value in verdicts.items()},
        **_cut("prompt", row.get("prompt")),
        "sides": sides,
    }


def _cut(key: str, value: Any) -> Row:
    """A text as far as it is shown, and how many characters are not; conversations are shown turn by turn."""
    if isinstance(value, list):
        value = "\n".join(
            f"{turn.get('role', '')}: {turn.get('content', '')}" if isinstance(turn, dict) else str(turn)
            for turn in value
        )
    text = "" if value is None else str(value)
    return {key: text[:_LONGEST], f"{key}_cut": max(0, len(text) - _LONGEST)}
