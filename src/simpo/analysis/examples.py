"""Examples for a report: held-out pairs with their largest gains and losses, and answers before and after."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from simpo.analysis.headline import trained_run
from simpo.analysis.reading import Row, Run, in_order

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
